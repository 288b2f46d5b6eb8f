"""Rounding of one matrix to the code points of a scheme, by the nearest or by GPTQ, with its error over calibration."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.core.schemes import Scheme
from moe_reduce.models.parameters import Parameter
from moe_reduce.models.weights import Quantised, assemble, quantise
from moe_reduce.models.weights.quantised import as_matrix
from moe_reduce.models.weights.scales import Grid, Ranges, blocks, extremes, grid, unblocked
from moe_reduce.quantization.awq import output_error
from moe_reduce.quantization.gptq import gptq
from moe_reduce.quantization.moments import Moments


class CalibratedMatrix(NamedTuple):
    """A quantised matrix, the squared change of its products over calibration, and their squared size."""

    value: Quantised
    changed: jax.Array
    size: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NearestPoint:
    """Code points nearest to the weights of one input, on a grid that is fixed."""

    grid: Grid
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})

    def __call__(self, row_O: jax.Array, index: jax.Array) -> jax.Array:
        """Weights of an input [O], rounded. index: number of the input."""
        block = self.scheme.block(self.inputs, row_O.shape[0])
        place, zeros = index // block[0], self.grid.zeros
        points = Grid(self.grid.scales[place][None], None if zeros is None else zeros[place][None])
        row = dataclasses.replace(self.scheme, scope="channel") if block[1] == 1 else self.scheme
        values = blocks(row_O[None], row)
        return unblocked(points.values(points.codes(values, row), row), (1, row_O.shape[0]))[0]


@partial(jax.jit, static_argnums=(1, 2, 3))
def nearest_rounded(
    matrix: jax.Array, record: Parameter, scheme: Scheme, ranges: Ranges = extremes, seen: Moments | None = None
) -> CalibratedMatrix:
    """Round one matrix to the nearest code points. seen: moments of its inputs; None: the error is not measured."""
    return _measured(matrix, record, quantise(matrix, record, scheme, ranges), seen)


@partial(jax.jit, static_argnums=(1, 2, 3))
def gptq_rounded(
    matrix: jax.Array, record: Parameter, scheme: Scheme, ranges: Ranges, seen: Moments
) -> CalibratedMatrix:
    """Round one matrix by GPTQ, on the grid that rounding to nearest would use."""
    value = quantise(matrix, record, scheme, ranges)
    flat_IO, points = as_matrix(matrix, record).astype(jnp.float32), value.grid
    rounded_IO = gptq(flat_IO, seen.hessian_II, NearestPoint(points, scheme, flat_IO.shape[0]))
    found = unblocked(points.codes(blocks(rounded_IO, scheme), scheme), flat_IO.shape)
    # the codes alone: storing the scales a second time could round them again
    codes = assemble(found, points, record, scheme).codes
    return _measured(matrix, record, dataclasses.replace(value, codes=codes), seen)


def _measured(matrix: jax.Array, record: Parameter, value: Quantised, seen: Moments | None) -> CalibratedMatrix:
    if seen is None:
        return CalibratedMatrix(value, jnp.zeros(()), jnp.zeros(()))
    before_IO, after_IO = (as_matrix(x, record).astype(jnp.float32) for x in (matrix, value.dequantised()))
    changed = output_error(after_IO - before_IO, seen.hessian_II)
    return CalibratedMatrix(value, changed, output_error(before_IO, seen.hessian_II))


@dataclass(frozen=True)
class Values:
    """Rounding of a matrix [I, O] to its quantised values; hashable, for `awq.input_scales`."""

    scheme: Scheme
    ranges: Ranges = extremes

    def __call__(self, matrix_IO: jax.Array) -> jax.Array:
        """Nearest values of a matrix, fp32 [I, O]."""
        values = blocks(matrix_IO, self.scheme)
        found = grid(*self.ranges(values, self.scheme), self.scheme)
        return unblocked(found.values(found.codes(values, self.scheme), self.scheme), matrix_IO.shape)
