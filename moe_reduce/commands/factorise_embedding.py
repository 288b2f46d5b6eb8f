"""moe-reduce factorise-embedding: factorise the tied embedding into two thin matrices by truncated SVD."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument(
        "--inner", required=True, type=int, help="inner width of the two factors, at most the model's width"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the model with the factorised embedding and returns its path."""
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.embedding import factorise_embedding

    factorised = factorise_embedding(model, arguments.inner)
    return transforming.write(arguments, model, factorised, {"inner": arguments.inner})
