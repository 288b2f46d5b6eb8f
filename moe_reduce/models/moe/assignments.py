"""Assignments of tokens to experts, sorted by group: the order, the gather of rows and the weighted sum back.

The group of an assignment is its expert or, with a bank of Z adapters, expert · Z + entry, so that rows sorted by group
are sorted by expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.models.moe.experts import Masters
from moe_reduce.models.products import accumulation_dtype


class Sizes(NamedTuple):
    """Measures of each assignment's output f, fp32 [S, A]; 0 where no expert ran."""

    norm: jax.Array  # ‖f(x)‖₂
    maximum: jax.Array  # max |f(x)|
    largest: jax.Array  # max f(x), with its sign


def sizes_of(outputs: jax.Array) -> Sizes:
    """Sizes of output vectors: [..., D] -> three arrays [...]."""
    found = outputs.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(found), axis=-1))
    return Sizes(norm, jnp.max(jnp.abs(found), axis=-1), jnp.max(found, axis=-1))


class Result(NamedTuple):
    """Result of one call of the experts. Only scoring reads the sizes; where nothing does, XLA removes them."""

    y_SD: jax.Array
    masters: Masters  # unchanged, to be passed to the next call (see Experts)
    dropped: jax.Array  # scalar: number of assignments beyond the capacity of their expert; 0 if dropless
    sizes: Sizes


class Order(NamedTuple):
    """Assignments sorted by group: row m of the sorted buffer is assignment order_M[m].

    rank_SA is the inverse: the row of each assignment. counts_J: number of rows of each group.
    """

    order_M: jax.Array
    rank_SA: jax.Array
    counts_J: jax.Array


def sort_by_group(groups_SA: jax.Array, groups: int) -> Order:
    """Assignments sorted by group. The sort is stable, which makes the order deterministic."""
    flat_M = groups_SA.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    positions_M = jnp.arange(flat_M.size, dtype=jnp.int32)
    rank_M = jnp.zeros_like(order_M).at[order_M].set(positions_M, unique_indices=True)
    # groups are counted by searching the sorted ids, which for thousands of experts is cheaper than a scatter
    bounds = jnp.searchsorted(
        flat_M[order_M], jnp.arange(groups + 1, dtype=flat_M.dtype), method="scan_unrolled"
    ).astype(jnp.int32)
    return Order(order_M, rank_M.reshape(groups_SA.shape), jnp.diff(bounds))


def _sums(rows_MD: jax.Array, weights_SA: jax.Array, rank_SA: jax.Array) -> jax.Array:
    """Σ_a weight · row, [S, D]. On TPU this is a loop over A, because TPU tiles would pad an axis of size A to 8."""

    def at_once(rows_MD, weights_SA, rank_SA):
        return jnp.sum(rows_MD[rank_SA] * weights_SA[:, :, None], axis=1)

    def in_turn(rows_MD, weights_SA, rank_SA):
        weighted = (
            rows_MD[rank_S] * weight_S[:, None] for rank_S, weight_S in zip(rank_SA.T, weights_SA.T, strict=True)
        )
        total: Any = sum(row_SD.astype(accumulation_dtype(row_SD.dtype)) for row_SD in weighted)
        return total.astype(rows_MD.dtype)

    return jax.lax.platform_dependent(rows_MD, weights_SA, rank_SA, tpu=in_turn, default=at_once)


def _dots(rows_MD: jax.Array, y_SD: jax.Array, rank_SA: jax.Array) -> jax.Array:
    """Dot product of each assignment's row with its token's y, fp32 [S, A]; on TPU a loop over A, as in `_sums`."""

    def at_once(rows_MD, y_SD, rank_SA):
        return jnp.sum(y_SD[:, None].astype(jnp.float32) * rows_MD[rank_SA].astype(jnp.float32), axis=-1)

    def in_turn(rows_MD, y_SD, rank_SA):
        return jnp.concatenate([at_once(rows_MD, y_SD, rank_S[:, None]) for rank_S in rank_SA.T], axis=1)

    return jax.lax.platform_dependent(rows_MD, y_SD, rank_SA, tpu=in_turn, default=at_once)


@jax.custom_vjp
def gather_rows(x_SD: jax.Array, order: Order) -> jax.Array:
    """x_SD -> x_MD, the sorted rows. The gradient is a gather too, since a scatter-add runs serially on CPU."""
    return x_SD[order.order_M // order.rank_SA.shape[1]]


def _gather_forward(x_SD: jax.Array, order: Order) -> tuple[jax.Array, Order]:
    return gather_rows(x_SD, order), order


def _gather_backward(order: Order, dx_MD: jax.Array) -> tuple[jax.Array, None]:
    return _sums(dx_MD, jnp.ones(order.rank_SA.shape, dx_MD.dtype), order.rank_SA), None


gather_rows.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def combine_rows(y_MD: jax.Array, weights_SA: jax.Array, order: Order) -> jax.Array:
    """Sorted expert outputs -> y_SD = Σ_a weight · output."""
    return _sums(y_MD, weights_SA.astype(y_MD.dtype), order.rank_SA)


def _combine_forward(y_MD: jax.Array, weights_SA: jax.Array, order: Order):
    return combine_rows(y_MD, weights_SA, order), (y_MD, weights_SA, order)


def _combine_backward(saved: tuple[jax.Array, jax.Array, Order], dy_SD: jax.Array):
    y_MD, weights_SA, order = saved
    weights_M = weights_SA.reshape(-1)[order.order_M].astype(dy_SD.dtype)
    dy_MD = dy_SD[order.order_M // weights_SA.shape[1]] * weights_M[:, None]
    return dy_MD, _dots(y_MD, dy_SD, order.rank_SA).astype(weights_SA.dtype), None


combine_rows.defvjp(_combine_forward, _combine_backward)


def combined(y_MD: jax.Array, weights_SA: jax.Array, order: Order, masters: Masters, dropped: Any = 0.0) -> Result:
    """Result of a call whose expert outputs y_MD are in sorted order."""
    sizes = sizes_of(jax.lax.stop_gradient(y_MD))
    return Result(
        combine_rows(y_MD, weights_SA, order),
        masters,
        jnp.asarray(dropped, jnp.float32),
        Sizes(*(size_M[order.rank_SA] for size_M in sizes)),
    )
