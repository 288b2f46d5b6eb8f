"""Weights on disk: one tensor for an array, and several for a quantised matrix.

`quantization_config` in config.json says which layout a model directory has: that of compressed-tensors
(compressed_tensors.py), of GPTQ or AWQ (packed_words.py), one of a model's makers (published_layouts.py), or ours
(native_layout.py) with the scheme of each parameter. Without it, a matrix with scales beside it is int8 in our layout,
as earlier versions wrote it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_reduce.core import json_files
from moe_reduce.core.schemes import Scheme
from moe_reduce.families import CONFIG_FILE, QUANTISATION, QUANTISATION_METHOD, ParameterLayout
from moe_reduce.models.weights import Quantised
from moe_reduce.models.weights.scales import DoubleScales
from moe_reduce.storage import compressed_tensors, native_layout, packed_words, published_layouts
from moe_reduce.storage.tensors import Tensors
from moe_reduce.storage.weight_parts import Part

Layout = Callable[[ParameterLayout, Scheme], list[Part]]


def stated(directory: Path) -> dict[str, Any]:
    """The content of `quantization_config` in config.json; empty without one."""
    file = directory / CONFIG_FILE
    return (json_files.read_object(file).get(QUANTISATION) or {}) if file.is_file() else {}


def scheme_of(leaf: ParameterLayout, files: Tensors) -> Scheme | None:
    """The scheme in which these files hold a weight; None for an array."""
    return _layout(files).scheme_of(leaf, files)


def parts_of(leaf: ParameterLayout, files: Tensors) -> list[Part]:
    """The arrays that hold a weight in these files."""
    return like(files, leaf, leaf)


def like(files: Tensors, stored: ParameterLayout, leaf: ParameterLayout) -> list[Part]:
    """The arrays of a weight `leaf` in the layout and scheme in which these files hold the weight `stored`."""
    layout = _layout(files)
    scheme = layout.scheme_of(stored, files)
    return [Part("", leaf)] if scheme is None else layout.parts_like(stored, leaf, scheme, files)


def check_runs(leaf: ParameterLayout, files: Tensors) -> None:
    """Raise UserError for a quantised weight that products cannot read, although its values can be had."""
    scheme = scheme_of(leaf, files)
    if scheme is not None and _layout(files) is packed_words:
        packed_words.check_order(leaf, scheme, files)


def is_spare(name: str, files: Tensors) -> bool:
    """True for a tensor that a program adds to quantised models and that changes nothing."""
    return _layout(files) is packed_words and packed_words.is_spare(name, files)


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
    if named in packed_words.METHODS:
        return packed_words
    return compressed_tensors if named == compressed_tensors.METHOD else native_layout


def arrays_of(leaf: ParameterLayout, value: Any, layout: Layout = native_layout.parts) -> list[tuple[Part, Any]]:
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


def value_of(leaf: ParameterLayout, scheme: Scheme | None, arrays: dict[str, Any]) -> Any:
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


def read_value(leaf: ParameterLayout, files: Tensors, index: tuple[int, ...], experts: slice = slice(None)) -> Any:
    """One tensor's values: an array, or a quantised matrix. index: of its layer and expert, as far as it is numbered.

    experts: those that are read of a tensor that holds all of a layer.
    """
    scheme = scheme_of(leaf, files)
    places = (experts,) if leaf.record.axes[len(index) :].startswith("E") else ()
    read = files.read if places else files.read_whole
    found = {
        part.key: part.from_disk(read(part.leaf.name(index)))[(*places, ...)]
        for part in parts_of(leaf, files)
        if part.key or scheme is None
    }
    return value_of(leaf, scheme, found)


def read_values(leaf: ParameterLayout, files: Tensors, index: tuple[int, ...], experts: slice = slice(None)) -> Any:
    """The same as `read_value`, dequantised to fp32."""
    value, scheme = read_value(leaf, files, index, experts), scheme_of(leaf, files)
    if not isinstance(value, Quantised) or scheme is None:
        return value
    order = packed_words.order_of(leaf, scheme, files, index) if _layout(files) is packed_words else None
    return _dequantised(jax.tree.map(jnp.asarray, value)) if order is None else _by_group(value, order)


@jax.jit
def _dequantised(value: Quantised) -> jax.Array:
    return value.dequantised()


def _by_group(value: Quantised, groups: np.ndarray) -> np.ndarray:
    """Values of a matrix whose groups are not neighbours. groups: the group of each input."""
    points, grid = np.asarray(value.unpacked(), np.float32), value.grid
    zeros = np.asarray(grid.zeros, np.float32)[groups]
    return ((points - zeros) * np.asarray(grid.scales)[groups]).reshape(value.shape)


def sharding_of(part: Part, leaf: ParameterLayout, sharding: Any) -> Any:
    """Sharding of one array of a weight, given that of the whole parameter."""
    if isinstance(sharding, Quantised):
        return arrays_by_key(sharding)[part.key]
    if not part.key or not isinstance(sharding, NamedSharding):
        return sharding
    spec = dict(zip(leaf.record.axes, sharding.spec, strict=False))  # a spec may leave out its last axes
    if part.key == "codes":
        spec["I"] = spec.get(leaf.record.inputs[0])
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec.get(letter) for letter in part.leaf.record.axes)))
