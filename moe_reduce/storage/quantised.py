"""Layout of quantised weights on disk: integers under the name of the weight, and beside them its scales.

An `Int8` is two tensors, NAME (int8) and NAME_scale (fp32, one for each output). Every other weight is one tensor.
"""

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_reduce.core.errors import UserError
from moe_reduce.families import Leaf
from moe_reduce.models.weights import Int8
from moe_reduce.storage.tensors import Tensors

SCALE = "_scale"
DTYPES = (np.dtype(np.int8), np.dtype(np.float32))  # of the tensors of an Int8


def arrays_of(leaf: Leaf, weight: Any) -> list[tuple[Leaf, Any]]:
    """Arrays that hold a weight, each with its layout."""
    if isinstance(weight, Int8):
        return [(leaf, weight.whole), (_scales(leaf), weight.scale)]
    return [(leaf, weight)]


def layouts(leaf: Leaf, quantised: bool) -> list[Leaf]:
    """Layouts of the arrays that hold a weight."""
    return [leaf, _scales(leaf)] if quantised else [leaf]


def is_stored_quantised(leaf: Leaf, names: Container[str]) -> bool:
    """True if files of these tensors hold the weight in quantised form."""
    return leaf.record.is_matrix and leaf.name((0,) * len(leaf.stacked)) + SCALE in names


def stored_leaves(leaf: Leaf, names: Container[str]) -> list[Leaf]:
    """Layouts of the arrays that hold a weight in files of these tensors."""
    return layouts(leaf, is_stored_quantised(leaf, names))


def weight_of(arrays: Sequence[Any]) -> Any:
    """The weight that these arrays hold; inverse of `arrays_of`."""
    return Int8(*arrays) if len(arrays) > 1 else arrays[0]


def check_dtypes(files: Tensors, parts: Sequence[Leaf]) -> None:
    """Raise UserError when the tensors of a quantised weight are of other dtypes than those of an Int8."""
    for part, dtype in zip(parts, DTYPES, strict=True):
        for name in part.names():
            entry = files.entries[name]
            if entry.dtype != dtype:
                raise UserError(
                    f"tensor {name} in {entry.file} is {entry.dtype}, quantised weights need {dtype}: quantise again"
                )


def sharding_of(part: Leaf, leaf: Leaf, sharding: Any) -> Any:
    """Sharding of one array of a weight, given that of the whole parameter."""
    if isinstance(sharding, Int8):
        return sharding.whole if part is leaf else sharding.scale
    if part is leaf or not isinstance(sharding, NamedSharding):
        return sharding
    spec = dict(zip(leaf.record.axes, sharding.spec, strict=False))  # a spec may leave out its last axes
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec.get(letter) for letter in part.record.axes)))


def _scales(leaf: Leaf) -> Leaf:
    return leaf.without(leaf.record.inputs, SCALE)
