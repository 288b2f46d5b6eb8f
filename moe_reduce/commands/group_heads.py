"""moe-reduce group-heads: merge key/value heads into fewer, each the mean of its group (arXiv:2305.13245)."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument(
        "--key-value-heads", required=True, type=int, help="heads to keep; must divide the present number of heads"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the model with grouped heads and returns its path."""
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.heads import group_heads

    grouped = group_heads(model, arguments.key_value_heads)
    return transforming.write(arguments, model, grouped, {"key_value_heads": arguments.key_value_heads})
