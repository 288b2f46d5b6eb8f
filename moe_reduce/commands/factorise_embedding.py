"""moe-reduce factorise-embedding: the tied token table as two thin factors, by truncated SVD."""

import argparse
from pathlib import Path

from moe_reduce.commands import transforming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    transforming.add_arguments(parser)
    parser.add_argument("--inner", required=True, type=int, help="width between the factors, at most the model's")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the model with the factorised embedding and returns its path."""
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.embedding import factorise_embedding

    factorised = factorise_embedding(model, arguments.inner)
    return transforming.write(arguments, model, factorised, {"inner": arguments.inner})
