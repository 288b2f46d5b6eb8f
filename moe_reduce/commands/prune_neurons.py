"""moe-reduce prune-neurons: drop the smallest neurons of feed-forward blocks or experts."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument("--keep", required=True, type=int, help="neurons to keep in each feed-forward block or expert")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the narrower model and returns its path."""
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.neurons import prune_neurons

    pruned = prune_neurons(model, arguments.keep)
    return transforming.write(arguments, model, pruned, {"keep": arguments.keep})
