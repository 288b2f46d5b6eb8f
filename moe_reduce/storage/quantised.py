"""Weights on disk: one tensor for an array, and several for a quantised matrix.

`quantization_config` in config.json says which layout a model directory has: that of compressed-tensors
(compressed_tensors.py), one of a model's makers (published_layouts.py), or ours (native_layout.py) with the scheme of
each parameter. Without it, a matrix with scales beside it is int8 in our layout, as earlier versions wrote it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from moe_reduce.core import json_files
from moe_reduce.core.schemes import Scheme
from moe_reduce.families import CONFIG_FILE, QUANTISATION, QUANTISATION_METHOD, Leaf
from moe_reduce.models.weights import Quantised
from moe_reduce.models.weights.scales import DoubleScales
from moe_reduce.storage import compressed_tensors, native_layout, published_layouts
from moe_reduce.storage.tensors import Tensors
from moe_reduce.storage.weight_parts import Part

Layout = Callable[[Leaf, Scheme], list[Part]]


def stated(directory: Path) -> dict[str, Any]:
    """The content of `quantization_config` in config.json; empty without one."""
    file = directory / CONFIG_FILE
    return (json_files.read_object(file).get(QUANTISATION) or {}) if file.is_file() else {}


def scheme_of(leaf: Leaf, files: Tensors) -> Scheme | None:
    """The scheme in which these files hold a weight; None for an array."""
    return _layout(files).scheme_of(leaf, files)


def parts_of(leaf: Leaf, files: Tensors) -> list[Part]:
    """The arrays that hold a weight in these files."""
    return like(files, leaf, leaf)


def like(files: Tensors, stored: Leaf, leaf: Leaf) -> list[Part]:
    """The arrays of a weight `leaf` in the layout and scheme in which these files hold the weight `stored`."""
    layout = _layout(files)
    scheme = layout.scheme_of(stored, files)
    return [Part("", leaf)] if scheme is None else layout.parts_like(stored, leaf, scheme, files)


def restated(files: Tensors, schemes: Mapping[str, Scheme | None]) -> dict[str, Any] | None:
    """`quantization_config` of a model that holds parts of these files, from the schemes of its parameters by path."""
    if names_modules(files):
        return dict(files.quantisation)
    return native_layout.described({path: scheme for path, scheme in schemes.items() if scheme is not None})


def names_modules(files: Tensors) -> bool:
    """True where the layout is that of another program, so that a model of another family cannot have it."""
    return _layout(files) is not native_layout


def _layout(files: Tensors) -> Any:
    named = files.quantisation.get(QUANTISATION_METHOD)
    if named in published_layouts.METHODS:
        return published_layouts
    return compressed_tensors if named == compressed_tensors.METHOD else native_layout


def arrays_of(leaf: Leaf, value: Any, layout: Layout = native_layout.parts) -> list[tuple[Part, Any]]:
    """The arrays of a weight in a layout. A part that holds none, such as a shape, goes with the codes."""
    if not isinstance(value, Quantised):
        return [(Part("", leaf), value)]
    arrays = arrays_by_key(value)
    return [(part, arrays.get(part.key, value.codes)) for part in layout(leaf, value.scheme)]


def arrays_by_key(value: Quantised) -> dict[str, Any]:
    """The arrays of a quantised value by the keys of their parts."""
    held = value.scales
    found = {"codes": value.codes, "zeros": value.zeros, "scales": held}
    if isinstance(held, DoubleScales):
        found |= {"scales": held.codes, "steps": held.steps, "mean": held.mean}
    return {key: array for key, array in found.items() if array is not None}


def value_of(leaf: Leaf, scheme: Scheme | None, arrays: dict[str, Any]) -> Any:
    """The weight that these arrays, by the keys of their parts, hold; inverse of `arrays_by_key`."""
    if scheme is None:
        return arrays[""]
    record = leaf.record
    sizes = dict(zip(record.axes, record.shape, strict=True))
    held = arrays["scales"]
    if "steps" in arrays:
        held = DoubleScales(held, arrays["steps"], arrays["mean"])
    return Quantised(
        arrays["codes"], held, arrays.get("zeros"), scheme, tuple(sizes[x] for x in record.inputs), len(record.outputs),
        record.outputs_first,
    )  # fmt: skip


def sharding_of(part: Part, leaf: Leaf, sharding: Any) -> Any:
    """Sharding of one array of a weight, given that of the whole parameter."""
    if isinstance(sharding, Quantised):
        return arrays_by_key(sharding)[part.key]
    if not part.key or not isinstance(sharding, NamedSharding):
        return sharding
    spec = dict(zip(leaf.record.axes, sharding.spec, strict=False))  # a spec may leave out its last axes
    if part.key == "codes":
        spec["I"] = spec.get(leaf.record.inputs[0])
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec.get(letter) for letter in part.leaf.record.axes)))
