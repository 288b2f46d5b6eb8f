"""Experts on a device that holds some of all: only rows that are theirs are moved and computed, a part at a time.

Of M assignments, sorted by expert, those of experts here come first. On average they are M over the number of devices;
how many they are is known only at run time, and they may be all. Buffers for M rows hold mostly nothing. So a loop
takes as many rows at a time as are expected, and some more: it turns once, unless tokens crowd here. Its gradient is
written here, since a loop with a dynamic trip count has none in reverse; it computes the experts again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_reduce.models.moe.gradients import Trained, as_leaves, dense, values, where_trained
from moe_reduce.models.products import wide

SLACK = 1.5  # rows of a part, over those expected
MULTIPLE = 128  # of rows in a part, which matrix units ask for

# (rows_RD sorted by expert, counts_E, weights of the experts: a tree) -> outputs_RD; rows past the counts are not read
Compute = Callable[[jax.Array, jax.Array, Any], jax.Array]


def rows_of_a_part(assignments: int, share: float) -> int:
    """Of `assignments`, of which a `share` is expected here."""
    return min(assignments, MULTIPLE * math.ceil(assignments * share * SLACK / MULTIPLE))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_parts(compute: Compute, rows: int, x_SD, weights_SA, order_M, counts_E, parameters):
    """(y_SD = Σ_a weight · output of the experts here, their outputs' norms [S, A] and maxima [S, A], fp32).

    Norms and maxima are for scoring: no gradient flows through them.

    Args:
        compute: what the experts make of rows of a part.
        rows: R, of a part.
        x_SD: tokens.
        weights_SA: of each assignment.
        order_M: assignments sorted by expert, those of experts elsewhere behind.
        counts_E: rows of each expert here, int32.
        parameters: handed to `compute`; a gradient is formed of those leaves that are differentiated.
    """
    return _forward(compute, rows, x_SD, weights_SA, order_M, counts_E, parameters)[0]


class Part(NamedTuple):
    """R assignments: their numbers and tokens, past the last one where none is, and how many each expert has."""

    assignment_R: jax.Array
    token_R: jax.Array
    counts_E: jax.Array


def _for_each_part(rows: int, shape_SA: tuple[int, ...], order_M, counts_E, body, carry):
    """body(part, carry) for every part in which there are rows of experts here."""
    assignments = math.prod(shape_SA)
    padded = jnp.pad(order_M, (0, -assignments % rows))
    ends_E = jnp.cumsum(counts_E)

    def visit(state):
        start, carry = state
        inside_R = start + jnp.arange(rows, dtype=jnp.int32) < ends_E[-1]
        assignment_R = jnp.where(inside_R, lax.dynamic_slice_in_dim(padded, start, rows), assignments)
        bounds_E = jnp.clip(ends_E - start, 0, rows)
        counts_here_E = jnp.diff(bounds_E, prepend=jnp.zeros(1, bounds_E.dtype))
        return start + rows, body(Part(assignment_R, assignment_R // shape_SA[1], counts_here_E), carry)

    return lax.while_loop(lambda state: state[0] < ends_E[-1], visit, (jnp.int32(0), carry))[1]


def _taken(array: jax.Array, numbers_R: jax.Array) -> jax.Array:
    return array.at[numbers_R].get(mode="fill", fill_value=0)


def _forward(compute: Compute, rows: int, x_SD, weights_SA, order_M, counts_E, parameters):
    weights_M = weights_SA.reshape(-1)

    def body(part: Part, carry):
        y_SD, norm_M, maximum_M = carry
        out_RD = compute(_taken(x_SD, part.token_R), part.counts_E, parameters)
        float_RD = out_RD.astype(jnp.float32)
        weighted_RD = out_RD * _taken(weights_M, part.assignment_R)[:, None].astype(out_RD.dtype)
        # what lies past the last row falls away, whatever it is
        return (
            y_SD.at[part.token_R].add(weighted_RD.astype(y_SD.dtype), mode="drop"),
            norm_M.at[part.assignment_R].set(jnp.linalg.norm(float_RD, axis=-1), mode="drop"),
            maximum_M.at[part.assignment_R].set(jnp.max(jnp.abs(float_RD), axis=-1), mode="drop"),
        )

    empty_M = jnp.zeros(weights_M.shape, jnp.float32)
    nothing = (jnp.zeros(x_SD.shape, wide(x_SD.dtype)), empty_M, empty_M)
    y_SD, norm_M, maximum_M = _for_each_part(rows, weights_SA.shape, order_M, counts_E, body, nothing)
    shape = weights_SA.shape
    results = (y_SD.astype(x_SD.dtype), norm_M.reshape(shape), maximum_M.reshape(shape))
    return results, (x_SD, weights_SA, order_M, counts_E, parameters)


def _marked_forward(compute: Compute, rows: int, *marked):
    results, saved = _forward(compute, rows, *values(marked))
    return results, (*saved, Trained.among(marked[-1]))


def _backward(compute: Compute, rows: int, saved, cotangents):
    x_SD, weights_SA, order_M, counts_E, parameters, trained = saved
    dy_SD, weights_M = dense(cotangents[0]), weights_SA.reshape(-1)

    def body(part: Part, carry):
        dx_SD, dweights_M, dparameters = carry
        out_RD, vjp = jax.vjp(
            lambda x_RD, parameters: compute(x_RD, part.counts_E, parameters), _taken(x_SD, part.token_R), parameters
        )
        dy_RD = _taken(dy_SD, part.token_R)
        dx_RD, more = vjp(dy_RD * _taken(weights_M, part.assignment_R)[:, None].astype(dy_RD.dtype))
        dweights_R = jnp.sum(dy_RD.astype(jnp.float32) * out_RD.astype(jnp.float32), axis=-1)
        return (
            dx_SD.at[part.token_R].add(dx_RD.astype(dx_SD.dtype), mode="drop"),
            dweights_M.at[part.assignment_R].set(dweights_R.astype(dweights_M.dtype), mode="drop"),
            where_trained(lambda total, gradient: total + gradient.astype(total.dtype), dparameters, more),
        )

    nothing = (jnp.zeros(x_SD.shape, wide(x_SD.dtype)), jnp.zeros_like(weights_M), trained.totals(parameters))
    dx_SD, dweights_M, dparameters = _for_each_part(rows, weights_SA.shape, order_M, counts_E, body, nothing)
    dweights_SA = dweights_M.reshape(weights_SA.shape)
    return dx_SD.astype(x_SD.dtype), dweights_SA, None, None, as_leaves(dparameters, parameters)


in_parts.defvjp(_marked_forward, _backward, symbolic_zeros=True)
