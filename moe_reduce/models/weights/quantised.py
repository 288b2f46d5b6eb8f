"""A quantised matrix: packed codes and their scales, one pytree in the place of an array among parameters."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core.schemes import BLOCK, Scheme
from moe_reduce.models.parameters import Parameter
from moe_reduce.models.weights import codes, scales
from moe_reduce.models.weights.scales import DoubleScales, Grid, Ranges

Axes = tuple[int | None, ...]  # for each axis of a part, the axis of the parameter that it follows; None: no axis
Function = Callable[[Axes, Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A matrix, or stacked matrices, in the format of a scheme (core/schemes.py).

    The arrays have the axes of the parameter, whose input axes are one axis: of packed bytes (codes.py) or of groups.

    codes: packed code points. scales: fp32, bf16, exponents of two (uint8) or `DoubleScales`; where several outputs
    share a scale, the output axes are one axis too. zeros: zero points, int8, with the axes of the scales; None unless
    the scheme is affine. inputs: sizes of the input axes. outputs: number of output axes. outputs_first: output axes
    come before input axes, as in token tables.
    """

    codes: jax.Array
    scales: Any
    zeros: jax.Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outputs: int = dataclasses.field(default=1, metadata={"static": True})
    outputs_first: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def lead(self) -> int:
        """Number of leading axes, which number matrices."""
        return self.codes.ndim - 1 - self.outputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        lead, rest = self.codes.shape[: self.lead], self.codes.shape[self.lead :]
        return (*lead, *rest[:-1], *self.inputs) if self.outputs_first else (*lead, *self.inputs, *rest[1:])

    @property
    def ndim(self) -> int:
        """Number of axes of the parameter."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the packed codes."""
        return self.codes.dtype

    @property
    def input_size(self) -> int:
        """Number of inputs of one matrix, I."""
        return math.prod(self.inputs)

    @property
    def grid(self) -> Grid:
        """Scales and zero points, [..., GI, GO]; the scales are fp32."""
        zeros = None if self.zeros is None else self._as_matrix(self.zeros)
        return Grid(self._as_matrix(scales.loaded(self.scales)), zeros)

    def unpacked(self) -> jax.Array:
        """Codes before packing, [..., I, O]."""
        return codes.unpack(self._as_matrix(self.codes), self.scheme.code, self.input_size)

    def dequantised(self, dtype: Any = jnp.float32) -> jax.Array:
        """The array that the codes stand for, with the axes of the parameter."""
        found = self.unpacked()
        values = self.grid.values(scales.blocks(found, self.scheme), self.scheme)
        matrix = scales.unblocked(values, found.shape).astype(dtype)
        return (jnp.swapaxes(matrix, -1, -2) if self.outputs_first else matrix).reshape(self.shape)

    def flat(self) -> "Quantised":
        """The same matrix with one input axis and one output axis."""
        lead = self.codes.shape[: self.lead]

        def two(array: jax.Array) -> jax.Array:
            keep = array.shape[-1] if self.outputs_first else array.shape[self.lead]
            return array.reshape(*lead, -1, keep) if self.outputs_first else array.reshape(*lead, keep, -1)

        held = self.scales
        held = dataclasses.replace(held, codes=two(held.codes)) if isinstance(held, DoubleScales) else two(held)
        zeros = None if self.zeros is None else two(self.zeros)
        return dataclasses.replace(
            self, codes=two(self.codes), scales=held, zeros=zeros, inputs=(self.input_size,), outputs=1
        )

    def rows(self, numbers: jax.Array, dtype: Any) -> jax.Array:
        """Some outputs of a matrix [O, I] with outputs first, such as tokens of a table: [*numbers, I] in a dtype."""
        shared = self.scheme.block(self.input_size, self.shape[0])[1]  # outputs that share a scale
        places = numbers // shared
        held = self.scales
        found = held.rows(places) if isinstance(held, DoubleScales) else scales.loaded(held[places])
        zeros = None if self.zeros is None else self.zeros[places][..., None]
        inner = codes.unpack(self.codes[numbers][..., None], self.scheme.code, self.input_size)
        one = (
            dataclasses.replace(self.scheme, scope="group", group=BLOCK)
            if self.scheme.scope == "block"
            else self.scheme
        )
        values = Grid(found[..., None], zeros).values(scales.blocks(inner, one), one)
        return scales.unblocked(values, inner.shape)[..., 0].astype(dtype)

    def map(self, function: Function, record: Parameter) -> "Quantised":
        """The matrix with each array replaced by function(axes, array); see `Axes`."""
        lead = tuple(range(self.lead))
        inner = [axis for axis in range(len(record.axes)) if axis not in lead and axis not in record.contracted]

        def axes(inputs: int | None, outs: Axes) -> Axes:
            return (*lead, *outs, inputs) if self.outputs_first else (*lead, inputs, *outs)

        of_scales = axes(None, (None,) if self.scheme.shares_outputs else tuple(inner))
        held = self.scales
        return dataclasses.replace(
            self,
            codes=function(axes(record.contracted[0], tuple(inner)), self.codes),
            scales=held.map(function, of_scales, lead) if isinstance(held, DoubleScales) else function(of_scales, held),
            zeros=None if self.zeros is None else function(of_scales, self.zeros),
        )

    def _as_matrix(self, array: jax.Array) -> jax.Array:
        """An array whose axes after the leading ones are those of inputs and outputs, as [..., inputs, outputs]."""
        lead = array.shape[: self.lead]
        if self.outputs_first:
            return jnp.swapaxes(array.reshape(*lead, -1, array.shape[-1]), -1, -2)
        return array.reshape(*lead, array.shape[self.lead], -1)


def quantise(matrix: jax.Array, record: Parameter, scheme: Scheme, ranges: Ranges = scales.extremes) -> Quantised:
    """Round a parameter, or some of its matrices, to the nearest code points. ranges: chooses the range of each block.

    matrix: with the axes of the record, of which leading ones may be left out. scheme: from Scheme.fitted.
    """
    flat = as_matrix(matrix, record).astype(jnp.float32)
    values = scales.blocks(flat, scheme)
    grid = scales.grid(*ranges(values, scheme), scheme)

    def rounded(grid: Grid) -> Quantised:
        return assemble(scales.unblocked(grid.codes(values, scheme), flat.shape), grid, record, scheme)

    value = rounded(grid)
    # storing may round scales, so codes are chosen for the scales as they will be read
    return dataclasses.replace(value, codes=rounded(value.grid).codes)


def as_matrix(matrix: jax.Array, record: Parameter) -> jax.Array:
    """A parameter, or some of its matrices, as [..., I, O]."""
    inputs, outputs = record.matrix_shape
    lead = matrix.shape[: matrix.ndim - len(record.inputs + record.outputs)]
    if record.outputs_first:
        return jnp.swapaxes(matrix.reshape(*lead, outputs, inputs), -1, -2)
    return matrix.reshape(*lead, inputs, outputs)


def assemble(found: jax.Array, grid: Grid, record: Parameter, scheme: Scheme) -> Quantised:
    """The quantised parameter of unpacked codes [..., I, O] and their grid."""
    sizes = dict(zip(record.axes, record.shape, strict=True))
    outs, first = tuple(sizes[letter] for letter in record.outputs), record.outputs_first

    def with_axes(array: jax.Array, outer: tuple[int, ...]) -> jax.Array:
        lead, size = array.shape[:-2], array.shape[-2]
        if first:
            return jnp.swapaxes(array, -1, -2).reshape(*lead, *outer, size)
        return array.reshape(*lead, size, *outer)

    outer = grid.scales.shape[-1:] if scheme.shares_outputs else outs
    held = scales.stored(with_axes(grid.scales, outer), scheme, 1 + len(outer))
    zeros = None if grid.zeros is None else with_axes(grid.zeros, outer)
    packed = with_axes(codes.pack(found, scheme.code), outs)
    return Quantised(packed, held, zeros, scheme, tuple(sizes[x] for x in record.inputs), len(outs), first)
