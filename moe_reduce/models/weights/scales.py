"""Scales and zero points of quantised matrices: chosen from the range of a block's values, stored, and read again.

Matrices here are [..., I, O] with any leading axes. A block is the values that share a scale (Scheme.block); scales are
[..., GI, GO], one for each block.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.core.schemes import SECOND_GROUP, Scheme
from moe_reduce.models.weights import codes

SYMMETRIC = {"int8": 127.0, "int4": 7.5, "fp8": 448.0, "nf4": 1.0, "ternary": 1.0}  # steps in the largest magnitude
AFFINE = {"int8": 255.0, "int4": 15.0}  # steps from the smallest value to the largest
LARGEST_INT8 = 127
Ranges = Callable[[jax.Array, Scheme], tuple[jax.Array, jax.Array]]  # blocks -> smallest and largest value of each


class Grid(NamedTuple):
    """The code points that the values of each block are rounded to: point = (code - zero) · scale.

    scales: [..., GI, GO], in the dtype in which they are stored, or fp32 where they are stored as other numbers. zeros:
    int8 of the same shape for an affine scheme, else None.
    """

    scales: jax.Array
    zeros: jax.Array | None = None

    def codes(self, blocks: jax.Array, scheme: Scheme) -> jax.Array:
        """Codes of the points nearest to the values of blocks [..., GI, BI, GO, BO]."""
        scales = _spread(self.scales).astype(jnp.float32)
        x = blocks / jnp.broadcast_to(jnp.where(scales > 0, scales, 1.0), blocks.shape)
        if self.zeros is not None:
            x = x + jnp.broadcast_to(_spread(self.zeros).astype(jnp.float32), x.shape)
        return codes.nearest(x, scheme.code)

    def values(self, found: jax.Array, scheme: Scheme) -> jax.Array:
        """Values of codes [..., GI, BI, GO, BO], fp32."""
        x = codes.points(found, scheme.code)
        if self.zeros is not None:
            x = x - jnp.broadcast_to(_spread(self.zeros).astype(jnp.float32), x.shape)
        return x * jnp.broadcast_to(_spread(self.scales).astype(jnp.float32), x.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoubleScales:
    """Scales that are quantised themselves: code · step + mean (QLoRA, arXiv:2305.14314, section 3).

    codes: int8, with the axes of the scales. steps: fp32 [..., K], one for each 256 scales in memory order. mean: fp32
    [...], of all scales of a matrix. The codes are integers, not the paper's 8-bit floats: their largest error is less.
    """

    codes: jax.Array
    steps: jax.Array
    mean: jax.Array

    @classmethod
    def of(cls, scales: jax.Array, axes: int) -> "DoubleScales":
        """Round fp32 scales, of which the last `axes` axes belong to one matrix."""
        flat = scales.reshape(*scales.shape[: scales.ndim - axes], -1)
        mean = jnp.mean(flat, axis=-1, keepdims=True)
        parts = _second_groups(flat - mean)
        steps = jnp.max(jnp.abs(parts), axis=-1, keepdims=True) / LARGEST_INT8
        found = jnp.round(parts / jnp.where(steps > 0, steps, 1.0)).astype(jnp.int8)
        found = found.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]].reshape(scales.shape)
        return cls(found, steps[..., 0], mean[..., 0])

    def scales(self) -> jax.Array:
        """The scales, fp32."""
        lead = self.codes.shape[: self.mean.ndim]
        parts = _second_groups(self.codes.reshape(*lead, -1).astype(jnp.float32)) * self.steps[..., None]
        flat = parts.reshape(*lead, -1)[..., : math.prod(self.codes.shape[len(lead) :])]
        return (flat + jnp.broadcast_to(self.mean[..., None], flat.shape)).reshape(self.codes.shape)

    def rows(self, numbers: jax.Array) -> jax.Array:
        """Scales of some rows of one matrix's codes [rows, G], fp32 [*numbers, G]."""
        groups = self.codes.shape[-1]
        places = numbers[..., None] * groups + jnp.broadcast_to(jnp.arange(groups), (*numbers.shape, groups))
        return self.codes[numbers].astype(jnp.float32) * self.steps[places // SECOND_GROUP] + self.mean

    def map(self, function: Callable[[Any, Any], Any], axes: Any, lead: Any) -> "DoubleScales":
        """The scales with each array replaced by function(axes, array). lead: axes of `mean`."""
        return dataclasses.replace(
            self, codes=function(axes, self.codes), steps=function((*lead, None), self.steps),
            mean=function(lead, self.mean),
        )  # fmt: skip


def _second_groups(flat: jax.Array) -> jax.Array:
    """[..., count] in groups of 256, filled up with zeros, [..., K, 256]."""
    spare = -flat.shape[-1] % SECOND_GROUP
    return jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, spare)]).reshape(*flat.shape[:-1], -1, SECOND_GROUP)


def blocks(matrix: jax.Array, scheme: Scheme) -> jax.Array:
    """A matrix [..., I, O] in blocks [..., GI, BI, GO, BO]; blocks at the edge are filled up with zeros."""
    inputs, outputs = matrix.shape[-2:]
    size, (rows, columns) = scheme.block(inputs, outputs), scheme.scales(inputs, outputs)
    spare = [(0, 0)] * (matrix.ndim - 2) + [(0, rows * size[0] - inputs), (0, columns * size[1] - outputs)]
    return jnp.pad(matrix, spare).reshape(*matrix.shape[:-2], rows, size[0], columns, size[1])


def unblocked(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of `blocks`. shape: of the matrix."""
    rows, height, columns, width = values.shape[-4:]
    return values.reshape(*shape[:-2], rows * height, columns * width)[..., : shape[-2], : shape[-1]]


def extremes(values: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of each block; for ternary, the mean magnitude (absmean) takes the place of both."""
    axes = (-3, -1)
    if scheme.code == "ternary":
        mean = jnp.mean(jnp.abs(values), axis=axes)
        return -mean, mean
    return jnp.min(values, axis=axes), jnp.max(values, axis=axes)


def grid(low: jax.Array, high: jax.Array, scheme: Scheme) -> Grid:
    """The grid that covers a range, [..., GI, GO]. A range of zero has scale 0."""
    if scheme.affine:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scales = _rounded((high - low) / AFFINE[scheme.code], scheme)
        wide = scales.astype(jnp.float32)
        zeros = codes.SMALLEST[scheme.code] - low / jnp.where(wide > 0, wide, 1.0)
        return Grid(scales, codes.nearest(zeros, scheme.code))
    size = jnp.maximum(-low, high)
    if scheme.code == "mxfp4":
        return Grid(_power(_exponent(size)))
    return Grid(_rounded(size / SYMMETRIC[scheme.code], scheme))


def _rounded(scales: jax.Array, scheme: Scheme) -> jax.Array:
    """Scales as they are stored. Those of groups of integers are bf16, rounded up, so that no value is cut off."""
    if scheme.scope != "group" or scheme.code == "nf4":
        return scales
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    return jax.lax.bitcast_convert_type(((bits + jnp.uint32(0xFFFF)) >> 16).astype(jnp.uint16), jnp.bfloat16)


def _exponent(size: jax.Array) -> jax.Array:
    """The smallest power of two, plus 127, with which no magnitude is above 7, half a step past the largest point."""
    bits = jax.lax.bitcast_convert_type(size, jnp.uint32) + jnp.uint32(1 << 21)
    return jnp.clip((bits >> 23).astype(jnp.int32) - 2, 0, 254)


def _power(exponent: jax.Array) -> jax.Array:
    """2^(exponent - 127), fp32; 0 for exponent 0, which only zeros have."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def stored(scales: jax.Array, scheme: Scheme, axes: int) -> Any:
    """Scales of a grid as a quantised matrix holds them. axes: number of their last axes that belong to one matrix."""
    if scheme.code == "nf4":
        return DoubleScales.of(scales, axes)
    if scheme.code == "mxfp4":
        return (jax.lax.bitcast_convert_type(scales, jnp.uint32) >> 23).astype(jnp.uint8)
    return scales


def loaded(held: Any) -> jax.Array:
    """Scales, fp32, of those that a quantised matrix holds; inverse of `stored`."""
    if isinstance(held, DoubleScales):
        return held.scales()
    return _power(held) if held.dtype == jnp.uint8 else held.astype(jnp.float32)


def _spread(scales: jax.Array) -> jax.Array:
    """[..., GI, GO] as [..., GI, 1, GO, 1]."""
    return scales[..., :, None, :, None]
