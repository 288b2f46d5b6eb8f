"""Chunked computation on a device that holds only some of the experts, and computes only their rows.

The M assignments are sorted by group, with those to this device's experts first. On average these are M / devices, but
their number is known only at run time and can reach M, so buffers of M rows would be mostly empty. Instead, a loop
takes chunks of SLACK times the expected number of rows; usually one chunk holds all rows. JAX cannot differentiate a
loop with a dynamic trip count in reverse, so its gradient is written here; it recomputes the experts' outputs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_reduce.models.moe.assignments import Order, Sizes, sizes_of
from moe_reduce.models.moe.gradients import Trained, as_leaves, instantiate_zeros, primal_values, where_trained
from moe_reduce.models.products import accumulation_dtype

SLACK = 1.5  # size of a chunk, as a multiple of the expected number of rows
MULTIPLE = 128  # the size of a chunk is a multiple of this, for the matrix units

# (rows_RD sorted by group, counts_J, parameters: a pytree) -> outputs_RD; rows past the sum of counts_J are ignored
Compute = Callable[[jax.Array, jax.Array, Any], jax.Array]


def chunk_rows(assignments: int, share: float) -> int:
    """Number of rows of a chunk. share: expected fraction of the assignments that this device computes."""
    return min(assignments, MULTIPLE * math.ceil(assignments * share * SLACK / MULTIPLE))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(compute: Compute, rows: int, x_SD, weights_SA, order: Order, parameters):
    """(y_SD = Σ_a weight · output over this device's experts, Sizes of their outputs).

    Sizes are for scoring: no gradient flows through them.

    Args:
        compute: returns the experts' outputs for a chunk's rows.
        rows: R, rows of a chunk.
        x_SD: tokens.
        weights_SA: combine weight of each assignment.
        order: assignments sorted by group; those to experts on other devices come last.
        parameters: weights of the experts, passed to `compute`. Only leaves that are differentiated get a gradient.
    """
    return _forward(compute, rows, x_SD, weights_SA, order, parameters)[0]


class Chunk(NamedTuple):
    """R assignments: their indices and tokens, out of range in empty rows, and the number of rows of each group."""

    assignment_R: jax.Array
    token_R: jax.Array
    counts_J: jax.Array


def _for_each_chunk(rows: int, shape_SA: tuple[int, ...], order: Order, body, carry):
    """Run body(chunk, carry) -> carry for every chunk that has rows of this device's experts."""
    assignments = math.prod(shape_SA)
    padded = jnp.pad(order.order_M, (0, -assignments % rows))
    ends_J = jnp.cumsum(order.counts_J)

    def visit(state):
        start, carry = state
        inside_R = start + jnp.arange(rows, dtype=jnp.int32) < ends_J[-1]
        assignment_R = jnp.where(inside_R, lax.dynamic_slice_in_dim(padded, start, rows), assignments)
        bounds_J = jnp.clip(ends_J - start, 0, rows)
        counts_here_J = jnp.diff(bounds_J, prepend=jnp.zeros(1, bounds_J.dtype))
        return start + rows, body(Chunk(assignment_R, assignment_R // shape_SA[1], counts_here_J), carry)

    return lax.while_loop(lambda state: state[0] < ends_J[-1], visit, (jnp.int32(0), carry))[1]


def _taken(array: jax.Array, numbers_R: jax.Array) -> jax.Array:
    return array.at[numbers_R].get(mode="fill", fill_value=0)


def _forward(compute: Compute, rows: int, x_SD, weights_SA, order: Order, parameters):
    weights_M = weights_SA.reshape(-1)

    def body(chunk: Chunk, carry):
        y_SD, sizes = carry
        out_RD = compute(_taken(x_SD, chunk.token_R), chunk.counts_J, parameters)
        weighted_RD = out_RD * _taken(weights_M, chunk.assignment_R)[:, None].astype(out_RD.dtype)
        # empty rows have indices out of range, so their values are dropped
        return (
            y_SD.at[chunk.token_R].add(weighted_RD.astype(y_SD.dtype), mode="drop"),
            jax.tree.map(
                lambda size_M, size_R: size_M.at[chunk.assignment_R].set(size_R, mode="drop"), sizes, sizes_of(out_RD)
            ),
        )

    empty_M = jnp.zeros(weights_M.shape, jnp.float32)
    nothing = (jnp.zeros(x_SD.shape, accumulation_dtype(x_SD.dtype)), Sizes(empty_M, empty_M, empty_M))
    y_SD, sizes = _for_each_chunk(rows, weights_SA.shape, order, body, nothing)
    sizes = Sizes(*(size_M.reshape(weights_SA.shape) for size_M in sizes))
    return (y_SD.astype(x_SD.dtype), sizes), (x_SD, weights_SA, order, parameters)


def _marked_forward(compute: Compute, rows: int, *marked):
    results, saved = _forward(compute, rows, *primal_values(marked))
    return results, (*saved, Trained.among(marked[-1]))


def _backward(compute: Compute, rows: int, saved, cotangents):
    x_SD, weights_SA, order, parameters, trained = saved
    dy_SD, weights_M = instantiate_zeros(cotangents[0]), weights_SA.reshape(-1)

    def body(chunk: Chunk, carry):
        dx_SD, dweights_M, dparameters = carry
        out_RD, vjp = jax.vjp(
            lambda x_RD, parameters: compute(x_RD, chunk.counts_J, parameters), _taken(x_SD, chunk.token_R), parameters
        )
        dy_RD = _taken(dy_SD, chunk.token_R)
        dx_RD, more = vjp(dy_RD * _taken(weights_M, chunk.assignment_R)[:, None].astype(dy_RD.dtype))
        dweights_R = jnp.sum(dy_RD.astype(jnp.float32) * out_RD.astype(jnp.float32), axis=-1)
        return (
            dx_SD.at[chunk.token_R].add(dx_RD.astype(dx_SD.dtype), mode="drop"),
            dweights_M.at[chunk.assignment_R].set(dweights_R.astype(dweights_M.dtype), mode="drop"),
            where_trained(lambda total, gradient: total + gradient.astype(total.dtype), dparameters, more),
        )

    nothing = (
        jnp.zeros(x_SD.shape, accumulation_dtype(x_SD.dtype)),
        jnp.zeros_like(weights_M),
        trained.totals(parameters),
    )
    dx_SD, dweights_M, dparameters = _for_each_chunk(rows, weights_SA.shape, order, body, nothing)
    dweights_SA = dweights_M.reshape(weights_SA.shape)
    return dx_SD.astype(x_SD.dtype), dweights_SA, None, as_leaves(dparameters, parameters)


in_chunks.defvjp(_marked_forward, _backward, symbolic_zeros=True)
