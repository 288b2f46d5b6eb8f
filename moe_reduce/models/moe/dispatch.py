"""Dispatch of tokens to their experts and back: five implementations of the same sum over the chosen experts.

blocks     dropless; a loop over tiles of sorted rows, which computes routed rows only. For CPU.
grouped    dropless; Triton kernels over tiles of sorted rows, which compute routed rows only. For GPU.
ragged     dropless; jax.lax.ragged_dot over sorted rows. For TPU; on GPU, XLA computes every expert on every row.
capacity   a fixed number of rows for each expert; further rows are dropped, and their share is reported.
reference  every expert on every token. Slow and plain, for tests.

Dropless dispatches compute every assignment.
"""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models import products
from moe_reduce.models.activations import SWIGLU
from moe_reduce.models.deltas import of_groups
from moe_reduce.models.moe import chunks, expert_loop
from moe_reduce.models.moe.assignments import Order, Result, combined, gather_rows, sizes_of, sort_by_group
from moe_reduce.models.moe.experts import Experts, Masters, swiglu, with_master_gradients
from moe_reduce.models.weights import Product, dequantised


class Assigned(NamedTuple):
    """Rows x_SD with their groups and combine weights_SA.

    groups_SA: int32, the expert or, with a bank of Z adapters, expert · Z + entry. Numbers from J on stand for no
    expert of this device.
    """

    x_SD: jax.Array
    groups_SA: jax.Array
    weights_SA: jax.Array


class Dispatch(Protocol):
    """A dispatch. share: expected fraction of the assignments whose experts are on this device."""

    def __call__(
        self, rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, share: float = 1.0, /
    ) -> Result: ...


def dispatch_blocks(
    rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, _share: float = 1.0
) -> Result:
    """Loop over tiles of sorted rows (moe/expert_loop.py); dropless."""
    order = sort_by_group(rows.groups_SA, experts.groups)
    x_MD = gather_rows(rows.x_SD, order)
    tile_rows = expert_loop.tile_rows(execution.block_rows, x_MD.shape[0], experts.groups)
    settings = expert_loop.Settings(tile_rows, experts.layout, experts.activation)
    deltas = {name: of_groups(delta, experts.number) for name, delta in experts.deltas.items()}
    found: Any = expert_loop.loop_swiglu(x_MD, order.counts_J, experts.values, masters, deltas, settings)
    y_MD, masters = found
    return combined(y_MD, rows.weights_SA, order, masters)


def dispatch_ragged(
    rows: Assigned, experts: Experts, masters: Masters, _execution: ExecutionConfig, share: float = 1.0
) -> Result:
    """Apply jax.lax.ragged_dot to the sorted rows, in chunks if a chunk is smaller than all rows; dropless."""
    order = sort_by_group(rows.groups_SA, experts.groups)
    assignments = rows.groups_SA.size
    size = chunks.chunk_rows(assignments, share)
    if size == assignments:
        return _sorted(rows, order, experts, masters, _ragged_product(order.counts_J), share)
    experts, masters = with_master_gradients(experts, masters)
    found: Any = chunks.in_chunks(_ragged_chunk, size, rows.x_SD, rows.weights_SA, order, experts)
    y_SD, sizes = found
    return Result(y_SD, masters, jnp.zeros(()), sizes)


def _ragged_chunk(rows_RD: jax.Array, counts_J: jax.Array, experts: Experts) -> jax.Array:
    return _sorted_swiglu(rows_RD, counts_J, experts, _ragged_product(counts_J))


def _ragged_product(counts_J: jax.Array) -> Product:
    def product(rows_MI: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows_MI, matrices, group_sizes=_sizes(counts_J, matrices))

    return product


def _sizes(counts_J: jax.Array, matrices: jax.Array) -> jax.Array:
    """Number of sorted rows of each matrix, [E or J, I, O]."""
    return jnp.sum(counts_J.reshape(matrices.shape[0], -1), axis=1)


def dispatch_grouped(
    rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, share: float = 1.0
) -> Result:
    """Exact and dropless: kernels over sorted rows (moe/triton_kernels.py).

    Experts with adapter deltas, with biases or with another activation than SwiGLU take a kernel for each matrix.
    """
    from moe_reduce.models.moe import triton_kernels  # imported here: a later jax may lack Pallas' Triton

    order = sort_by_group(rows.groups_SA, experts.groups)
    assignments, interpret = rows.groups_SA.size, execution.platform != "gpu"
    if experts.deltas or experts.biases or experts.activation != SWIGLU:

        def product(rows_MI: jax.Array, matrices: jax.Array) -> jax.Array:
            groups = triton_kernels.groups_of(_sizes(order.counts_J, matrices), assignments)
            return triton_kernels.product(rows_MI, matrices, groups, interpret)

        return _sorted(rows, order, experts, masters, product, share)
    groups = triton_kernels.groups_of(order.counts_J, assignments)
    token_M = order.order_M // rows.groups_SA.shape[1]
    values = tuple(dequantised(value, rows.x_SD.dtype) for value in experts.values)
    places = triton_kernels.Places(token_M, order.rank_SA, groups)
    results: Any = triton_kernels.swiglu(rows.x_SD, places, values, masters, interpret)
    y_MD, masters = results
    y_MD = y_MD if share == 1 else _only_here(y_MD, order.counts_J)
    return combined(y_MD, rows.weights_SA, order, masters)


def _sorted(rows: Assigned, order: Order, experts: Experts, masters: Masters, product: Product, share: float) -> Result:
    """Run the experts by a product of sorted rows with one matrix for each expert."""
    experts, masters = with_master_gradients(experts, masters)
    counts_J = None if share == 1 else order.counts_J
    y_MD = _sorted_swiglu(gather_rows(rows.x_SD, order), counts_J, experts, product)
    return combined(y_MD, rows.weights_SA, order, masters)


def _sorted_swiglu(rows_MD: jax.Array, counts_J: jax.Array | None, experts: Experts, product: Product) -> jax.Array:
    """Output of each sorted row's expert; 0 for rows past the sum of counts_J.

    counts_J: rows of each group; None if they cover all rows.
    """

    def multiply(rows_MI: jax.Array, matrices: jax.Array) -> jax.Array:
        matrices = matrices.astype(rows_MI.dtype)
        if counts_J is None:
            return checkpoint_name(product(rows_MI, matrices), products.REMAT_SAVED)
        # inputs are masked too, because kernels leave the gradient of rows of no expert undefined
        y_MO = product(_only_here(rows_MI, counts_J), matrices)
        return _only_here(checkpoint_name(y_MO, products.REMAT_SAVED), counts_J)

    return swiglu(rows_MD, experts, multiply)


def _only_here(rows_MI: jax.Array, counts_J: jax.Array) -> jax.Array:
    """Rows, with 0 past the sum of counts_J: those of experts on other devices, which kernels leave undefined."""
    return jnp.where((jnp.arange(rows_MI.shape[0]) < jnp.sum(counts_J))[:, None], rows_MI, 0)


def _each_expert(rows_EXI: jax.Array, matrices_EIO: jax.Array) -> jax.Array:
    return jnp.einsum("EXI,EIO->EXO", rows_EXI, matrices_EIO.astype(rows_EXI.dtype))


def dispatch_capacity(
    rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig, share: float = 1.0
) -> Result:
    """Each expert takes at most capacity_factor · mean rows, rounded up, in sorted order; further rows are dropped."""
    experts, masters = with_master_gradients(experts, masters)
    x_SD, groups_SA, weights_SA = rows
    count, assignments = experts.number, groups_SA.size
    order = sort_by_group(groups_SA, experts.groups)
    # rounded first, so that an error in the last bit of the float does not add a row
    capacity = min(assignments, math.ceil(round(assignments * execution.capacity_factor * share / count, 6)))
    counts_E = jnp.sum(order.counts_J.reshape(count, -1), axis=1)
    starts_E = jnp.cumsum(counts_E) - counts_E
    expert_M = groups_SA.reshape(-1)[order.order_M] // (experts.groups // count)
    position_M = jnp.arange(assignments, dtype=jnp.int32) - starts_E[jnp.minimum(expert_M, count - 1)]
    slot_M = jnp.where(position_M < capacity, expert_M * capacity + position_M, count * capacity)

    def to_buffer(rows_MI: jax.Array) -> jax.Array:
        buffer = jnp.zeros((count * capacity, rows_MI.shape[1]), rows_MI.dtype)
        return buffer.at[slot_M].set(rows_MI, mode="drop").reshape(count, capacity, -1)

    def from_buffer(rows_ECI: jax.Array) -> jax.Array:
        return rows_ECI.reshape(count * capacity, -1).at[slot_M].get(mode="fill", fill_value=0)

    def product(rows_ECI: jax.Array, matrices: jax.Array) -> jax.Array:
        if matrices.shape[0] == count:
            return _each_expert(rows_ECI, matrices)
        rows_MI, matrices = from_buffer(rows_ECI), matrices.astype(rows_ECI.dtype)
        return to_buffer(_ragged_product(order.counts_J)(rows_MI, matrices))

    y_MD = from_buffer(swiglu(to_buffer(gather_rows(x_SD, order)), experts, product))
    dropped = jnp.sum((expert_M < count) & (position_M >= capacity))
    return combined(y_MD, weights_SA, order, masters, dropped)


def dispatch_reference(
    rows: Assigned, experts: Experts, masters: Masters, _execution: ExecutionConfig, _share: float = 1.0
) -> Result:
    """Every expert on every token, for tests: memory grows as E · S · F."""
    experts, masters = with_master_gradients(experts, masters)
    x_SD, groups_SA, weights_SA = rows
    count, entries = experts.number, experts.groups // experts.number
    # without a bank there is nothing to divide, and the ONNX converter fails on integer division at dynamic sizes
    experts_SA = groups_SA if entries == 1 else groups_SA // entries

    def product(rows_ESI: jax.Array, matrices: jax.Array) -> jax.Array:
        if matrices.shape[0] == count:
            return _each_expert(rows_ESI, matrices)
        matrices_EZIO = matrices.reshape(count, entries, *matrices.shape[1:]).astype(rows_ESI.dtype)
        entry_SZ = jax.nn.one_hot(groups_SA[:, 0] % entries, entries, dtype=rows_ESI.dtype)
        return jnp.einsum("ESI,SZ,EZIO->ESO", rows_ESI, entry_SZ, matrices_EZIO)

    y_ESD = swiglu(jnp.broadcast_to(x_SD[None], (count, *x_SD.shape)), experts, product)
    chosen_SAE = jax.nn.one_hot(experts_SA, count, dtype=x_SD.dtype)
    y_SAD = jnp.einsum("SAE,ESD->SAD", chosen_SAE, y_ESD)
    y_SD = jnp.einsum("SA,SAD->SD", weights_SA.astype(x_SD.dtype), y_SAD)
    return Result(y_SD, masters, jnp.zeros(()), sizes_of(y_SAD))


DISPATCHES: dict[str, Dispatch] = {
    "blocks": dispatch_blocks,
    "ragged": dispatch_ragged,
    "grouped": dispatch_grouped,
    "capacity": dispatch_capacity,
    "reference": dispatch_reference,
}
