"""moe-reduce prune-neurons: narrower feed-forward blocks or experts, without their smallest neurons."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument("--keep", required=True, type=int, help="neurons left in each layer, or in each expert")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the narrower model and returns its path."""
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.neurons import prune_neurons

    pruned = prune_neurons(model, arguments.keep)
    return transforming.write(arguments, model, pruned, {"keep": arguments.keep})
