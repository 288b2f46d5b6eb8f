"""moe-reduce sparsify: zero the smallest weights, a share of each matrix or in the 2:4 pattern."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce.commands import model_arguments, transforming

if TYPE_CHECKING:
    from moe_reduce.models.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    transforming.add_arguments(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--share", type=float, help="share of each matrix to zero, such as 0.5")
    wanted.add_argument("--pattern", choices=("2:4",), help="keep two of each four inputs, for sparse tensor cores")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Writes the sparse model as dense tensors that contain zeros, and returns its path."""
    model = transforming.read(arguments, overrides)
    from moe_reduce.reduction.sparsity import prune_magnitude, prune_two_four

    sparse = prune_two_four(model) if arguments.share is None else prune_magnitude(model, arguments.share)
    zeros = _zeros(model), _zeros(sparse)
    settings = {"share": arguments.share, "pattern": arguments.pattern, "zeros": zeros[1]}
    path = transforming.write(arguments, model, sparse, settings)
    print(model_arguments.show({"zeros": f"{zeros[0]:,} -> {zeros[1]:,}"}, as_json=False))
    return path


def _zeros(model: "Model") -> int:
    import numpy as np

    from moe_reduce.core import trees

    leaves = trees.flatten(model.params).values()
    return sum(leaf.size - int(np.count_nonzero(np.asarray(leaf))) for leaf in leaves)
