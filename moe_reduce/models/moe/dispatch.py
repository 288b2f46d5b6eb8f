"""Dispatch of tokens to their experts and back: five implementations of the same sum over the chosen experts.

blocks     exact and dropless; a loop over tiles of sorted rows, so that only routed rows are computed. For CPU.
grouped    exact and dropless; Triton kernels over sorted rows, so that only routed rows are computed. For GPU.
ragged     exact and dropless; jax.lax.ragged_dot over sorted rows. For TPU; on GPU XLA computes every expert.
capacity   a fixed number of rows for each expert; what does not fit is dropped, and its share is reported.
reference  every expert on every token. Slow and plain, for tests.
"""

import math
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models import products
from moe_reduce.models.moe import chunks, expert_loop
from moe_reduce.models.moe.assignments import Order, Result, combined, gather_rows, sort_by_expert
from moe_reduce.models.moe.experts import Experts, Masters, swiglu, with_master_gradients
from moe_reduce.models.weights import Product, dequantised


class Assigned(NamedTuple):
    """Rows x_SD with their experts: ids experts_SA int32 (E: none on this device), and combine weights_SA."""

    x_SD: jax.Array
    experts_SA: jax.Array
    weights_SA: jax.Array


class Dispatch(Protocol):
    """An implementation. share: expected fraction of the assignments whose experts are on this device."""

    def __call__(
        self, rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, share: float = 1.0, /
    ) -> Result: ...


def dispatch_blocks(
    rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, _share: float = 1.0
) -> Result:
    """Exact and dropless: only routed rows are computed, tile by tile (see moe/expert_loop.py)."""
    order = sort_by_expert(rows.experts_SA, experts.number)
    x_MD = gather_rows(rows.x_SD, order)
    tile_rows = expert_loop.tile_rows(execution.block_rows, x_MD.shape[0], experts.number)
    settings = expert_loop.Settings(tile_rows, experts.layout)
    found: Any = expert_loop.loop_swiglu(x_MD, order.counts_E, experts.values, masters, experts.deltas, settings)
    y_MD, masters = found
    return combined(y_MD, rows.weights_SA, order, masters)


def dispatch_ragged(
    rows: Assigned, experts: Experts, masters: Masters, _execution: ExecutionConfig, share: float = 1.0
) -> Result:
    """Exact and dropless: jax.lax.ragged_dot over sorted rows, in chunks if a chunk is smaller than all rows."""
    order = sort_by_expert(rows.experts_SA, experts.number)
    assignments = rows.experts_SA.size
    size = chunks.chunk_rows(assignments, share)
    if size == assignments:
        return _sorted(rows, order, experts, masters, partial(jax.lax.ragged_dot, group_sizes=order.counts_E), share)
    experts, masters = with_master_gradients(experts, masters)
    found: Any = chunks.in_chunks(_ragged_chunk, size, rows.x_SD, rows.weights_SA, order, experts)
    y_SD, norm_SA, maximum_SA = found
    return Result(y_SD, masters, jnp.zeros(()), norm_SA, maximum_SA)


def _ragged_chunk(rows_RD: jax.Array, counts_E: jax.Array, experts: Experts) -> jax.Array:
    return _sorted_swiglu(rows_RD, counts_E, experts, partial(jax.lax.ragged_dot, group_sizes=counts_E))


def dispatch_grouped(
    rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, share: float = 1.0
) -> Result:
    """Exact and dropless: kernels over sorted rows (moe/triton_kernels.py); adapter deltas are not fused."""
    from moe_reduce.models.moe import triton_kernels  # imported here: a later jax may lack Pallas' Triton

    order = sort_by_expert(rows.experts_SA, experts.number)
    groups, interpret = triton_kernels.groups_of(order.counts_E, rows.experts_SA.size), execution.platform != "gpu"
    if experts.deltas:
        product = partial(triton_kernels.product, groups=groups, interpret=interpret)
        return _sorted(rows, order, experts, masters, product, share)
    token_M = order.order_M // rows.experts_SA.shape[1]
    values = tuple(dequantised(value, (1,), rows.x_SD.dtype) for value in experts.values)
    places = triton_kernels.Places(token_M, order.rank_SA, groups)
    results: Any = triton_kernels.swiglu(rows.x_SD, places, values, masters, interpret)
    y_MD, masters = results
    y_MD = y_MD if share == 1 else _only_here(y_MD, order.counts_E)
    return combined(y_MD, rows.weights_SA, order, masters)


def _sorted(rows: Assigned, order: Order, experts: Experts, masters: Masters, product: Product, share: float) -> Result:
    """Run the experts by a product of sorted rows with one matrix for each expert."""
    experts, masters = with_master_gradients(experts, masters)
    counts_E = None if share == 1 else order.counts_E
    y_MD = _sorted_swiglu(gather_rows(rows.x_SD, order), counts_E, experts, product)
    return combined(y_MD, rows.weights_SA, order, masters)


def _sorted_swiglu(rows_MD: jax.Array, counts_E: jax.Array | None, experts: Experts, product: Product) -> jax.Array:
    """Output of each sorted row's expert; 0 for rows past the sum of counts_E.

    counts_E: rows of each expert; None if they cover all rows.
    """

    def multiply(rows_MI: jax.Array, matrices_EIO: jax.Array) -> jax.Array:
        matrices_EIO = matrices_EIO.astype(rows_MI.dtype)
        if counts_E is None:
            return checkpoint_name(product(rows_MI, matrices_EIO), products.REMAT_SAVED)
        # the rows are masked as well, which masks their gradient
        y_MO = product(_only_here(rows_MI, counts_E), matrices_EIO)
        return _only_here(checkpoint_name(y_MO, products.REMAT_SAVED), counts_E)

    return swiglu(rows_MD, experts, multiply)


def _only_here(rows_MI: jax.Array, counts_E: jax.Array) -> jax.Array:
    """Rows with 0 past the sum of counts_E, where experts are on other devices and kernels leave undefined values."""
    return jnp.where((jnp.arange(rows_MI.shape[0]) < jnp.sum(counts_E))[:, None], rows_MI, 0)


def _each_expert(rows_EXI: jax.Array, matrices_EIO: jax.Array) -> jax.Array:
    return jnp.einsum("EXI,EIO->EXO", rows_EXI, matrices_EIO.astype(rows_EXI.dtype))


def dispatch_capacity(
    rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, share: float = 1.0
) -> Result:
    """Each expert takes at most capacity_factor · mean rows, rounded up, in sorted order; further rows are dropped."""
    experts, masters = with_master_gradients(experts, masters)
    x_SD, experts_SA, weights_SA = rows
    count, assignments = experts.number, experts_SA.size
    order = sort_by_expert(experts_SA, count)
    # rounded first, so that an error in the last bit of the float does not add a row
    capacity = min(assignments, math.ceil(round(assignments * execution.capacity_factor * share / count, 6)))
    starts_E = jnp.cumsum(order.counts_E) - order.counts_E
    expert_M = experts_SA.reshape(-1)[order.order_M]
    position_M = jnp.arange(assignments, dtype=jnp.int32) - starts_E[jnp.minimum(expert_M, count - 1)]
    slot_M = jnp.where(position_M < capacity, expert_M * capacity + position_M, count * capacity)
    x_MD = gather_rows(x_SD, order)
    buffer = jnp.zeros((count * capacity, x_SD.shape[1]), x_SD.dtype).at[slot_M].set(x_MD, mode="drop")
    y_ECD = swiglu(buffer.reshape(count, capacity, -1), experts, _each_expert)
    y_MD = y_ECD.reshape(count * capacity, -1).at[slot_M].get(mode="fill", fill_value=0)
    dropped = jnp.sum((expert_M < count) & (position_M >= capacity))
    return combined(y_MD, weights_SA, order, masters, dropped)


def dispatch_reference(
    rows: Assigned, experts: Experts, masters: Masters, _execution: ExecutionConfig, _share: float = 1.0
) -> Result:
    """Every expert on every token, for tests: memory grows as E · S · F."""
    experts, masters = with_master_gradients(experts, masters)
    x_SD, experts_SA, weights_SA = rows
    y_ESD = swiglu(jnp.broadcast_to(x_SD[None], (experts.number, *x_SD.shape)), experts, _each_expert)
    chosen_SAE = jax.nn.one_hot(experts_SA, experts.number, dtype=x_SD.dtype)
    y_SAD = jnp.einsum("SAE,ESD->SAD", chosen_SAE, y_ESD)
    y_SD = jnp.einsum("SA,SAD->SD", weights_SA.astype(x_SD.dtype), y_SAD)
    norm_SA = jnp.linalg.norm(y_SAD.astype(jnp.float32), axis=-1)
    return Result(y_SD, masters, jnp.zeros(()), norm_SA, jnp.max(jnp.abs(y_SAD.astype(jnp.float32)), axis=-1))


DISPATCHES: dict[str, Dispatch] = {
    "blocks": dispatch_blocks,
    "ragged": dispatch_ragged,
    "grouped": dispatch_grouped,
    "capacity": dispatch_capacity,
    "reference": dispatch_reference,
}
