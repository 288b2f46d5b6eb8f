"""Moving tokens to their experts and back: five ways to compute the same sum over the chosen experts.

    blocks     exact and dropless; loops over blocks of sorted rows, so that only routed rows are computed. For CPU.
    grouped    exact and dropless; kernels over the sorted rows, so that only routed rows are computed. For GPU.
    ragged     exact and dropless; jax.lax.ragged_dot over the sorted rows. For TPU; on GPU XLA computes every expert.
    capacity   a fixed number of rows for each expert; what does not fit is dropped and the share reported.
    reference  every expert on every token. Slow and plain, for tests.

Each takes rows x_SD, experts_SA (int32; E means "no expert here": the row adds nothing), weights_SA, the pool, and the
share of the assignments that is expected to be of experts here: 1 unless there are others elsewhere. It returns a
Result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models import deltas, products
from moe_reduce.models.moe import chunks, expert_loop
from moe_reduce.models.products import wide

Changes = dict[str, deltas.Delta]  # of an adapter, by `gate`, `up` and `down` (see models/deltas.py)


class Experts(NamedTuple):
    """The matrices of E SwiGLU experts."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Pool(NamedTuple):
    """Experts twice: as they are computed with, and as they are kept and trained.

    Casting once for all layers saves passes over the pool; gradients flow only into the masters, which every call
    takes and hands on, and so add up in fp32 whatever the compute dtype.
    """

    computed: Experts
    masters: Experts
    changes: Changes | None = None  # what an adapter adds

    @classmethod
    def of(cls, masters: Experts, dtype: jnp.dtype, changes: Changes | None = None) -> "Pool":
        """Masters, their copy in the compute dtype, and an adapter's changes."""
        return cls(Experts(*(jax.lax.stop_gradient(matrix.astype(dtype)) for matrix in masters)), masters, changes)


class Result(NamedTuple):
    """What one call of the experts gives. Sizes of raw expert outputs are for scoring; unused, they cost nothing."""

    y_SD: jax.Array
    pool: Pool  # for whoever uses it next
    dropped: jax.Array  # assignments that found no room at their expert, a scalar; 0 if dropless
    norm_SA: jax.Array  # ‖f(x)‖₂ of each assignment, fp32; 0 where no expert ran
    maximum_SA: jax.Array  # max |f(x)|, likewise


Grouped = Callable[[jax.Array, jax.Array], jax.Array]


class Dispatch(Protocol):
    """One of the ways. share: of the assignments, as many as are expected to be of experts here; 1: all of them are."""

    def __call__(
        self,
        x_SD: jax.Array,
        experts_SA: jax.Array,
        weights_SA: jax.Array,
        pool: Pool,
        execution: ExecutionConfig,
        share: float = 1.0,
        /,
    ) -> Result: ...


def borrow(pool: Pool, execution: ExecutionConfig) -> tuple[Experts, Pool]:
    """Matrices to compute with, differentiable unless experts are frozen, and the pool to hand on."""
    return _borrow(pool) if execution.expert_gradients else (pool.computed, pool)


@jax.custom_vjp
def _borrow(pool: Pool) -> tuple[Experts, Pool]:
    return pool.computed, pool


def _borrow_forward(pool: Pool):
    return _borrow(pool), None


def _borrow_backward(_, cotangents):
    dmatrices, dpool = cotangents
    totals = (total + part.astype(total.dtype) for total, part in zip(dpool.masters, dmatrices, strict=True))
    return (Pool(dpool.computed, Experts(*totals), dpool.changes),)


_borrow.defvjp(_borrow_forward, _borrow_backward)


class Order(NamedTuple):
    """Assignments sorted by expert: row m of the sorted buffer is assignment order_M[m]; rank_SA is the inverse."""

    order_M: jax.Array
    rank_SA: jax.Array
    counts_E: jax.Array


def sort_by_expert(experts_SA: jax.Array, experts: int) -> Order:
    """A stable sort, so that results do not depend on anything but the assignment itself."""
    flat_M = experts_SA.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True).astype(jnp.int32)
    positions_M = jnp.arange(flat_M.size, dtype=jnp.int32)
    rank_M = jnp.zeros_like(order_M).at[order_M].set(positions_M, unique_indices=True)
    # counts from the sorted ids: a search is cheaper than a scatter when there are thousands of experts
    bounds = jnp.searchsorted(
        flat_M[order_M], jnp.arange(experts + 1, dtype=flat_M.dtype), method="scan_unrolled"
    ).astype(jnp.int32)
    return Order(order_M, rank_M.reshape(experts_SA.shape), jnp.diff(bounds))


def _sums(rows_MD: jax.Array, weights_SA: jax.Array, rank_SA: jax.Array) -> jax.Array:
    """Σ_a weight · row, [S, D]. In turn on TPU, whose tiles would fill an axis of A up to 8."""

    def at_once(rows_MD, weights_SA, rank_SA):
        return jnp.sum(rows_MD[rank_SA] * weights_SA[:, :, None], axis=1)

    def in_turn(rows_MD, weights_SA, rank_SA):
        weighted = (
            rows_MD[rank_S] * weight_S[:, None] for rank_S, weight_S in zip(rank_SA.T, weights_SA.T, strict=True)
        )
        total: Any = sum(row_SD.astype(wide(row_SD.dtype)) for row_SD in weighted)
        return total.astype(rows_MD.dtype)

    return jax.lax.platform_dependent(rows_MD, weights_SA, rank_SA, tpu=in_turn, default=at_once)


def _dots(rows_MD: jax.Array, y_SD: jax.Array, rank_SA: jax.Array) -> jax.Array:
    """row · y, fp32 [S, A]. In turn on TPU, as `_sums`."""

    def at_once(rows_MD, y_SD, rank_SA):
        return jnp.sum(y_SD[:, None].astype(jnp.float32) * rows_MD[rank_SA].astype(jnp.float32), axis=-1)

    def in_turn(rows_MD, y_SD, rank_SA):
        return jnp.concatenate([at_once(rows_MD, y_SD, rank_S[:, None]) for rank_S in rank_SA.T], axis=1)

    return jax.lax.platform_dependent(rows_MD, y_SD, rank_SA, tpu=in_turn, default=at_once)


@jax.custom_vjp
def gather_rows(x_SD: jax.Array, order: Order) -> jax.Array:
    """x_SD -> x_MD, the sorted rows. Its gradient is a gather too: a scatter-add would run serially on CPU."""
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


def combined(y_MD: jax.Array, weights_SA: jax.Array, order: Order, pool: Pool, dropped: Any = 0.0) -> Result:
    """The Result of expert outputs in sorted order."""
    y_float = jax.lax.stop_gradient(y_MD).astype(jnp.float32)
    return Result(
        combine_rows(y_MD, weights_SA, order),
        pool,
        jnp.asarray(dropped, jnp.float32),
        jnp.sqrt(jnp.sum(jnp.square(y_float), axis=-1))[order.rank_SA],
        jnp.max(jnp.abs(y_float), axis=-1)[order.rank_SA],
    )


def _swiglu(rows: jax.Array, experts: Experts, changes: Changes | None, grouped: Grouped) -> jax.Array:
    """down(silu(gate·x) · up·x) of each row's expert, with an adapter's changes.

    grouped(rows, matrices) multiplies each row with the matrix of its expert.
    """

    changes = changes or {}

    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        if matrix.ndim == 3:
            return grouped(x, matrix)
        # one for all experts, such as a fixed projection
        return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    def linear(x: jax.Array, name: str, matrices: jax.Array) -> jax.Array:
        y = grouped(x, matrices)
        return y + deltas.added(x, changes[name], matrices.shape[2], multiply) if name in changes else y

    hidden = jax.nn.silu(linear(rows, "gate", experts.gate_EDF)) * linear(rows, "up", experts.up_EDF)
    return linear(hidden, "down", experts.down_EFD)


def dispatch_blocks(x_SD, experts_SA, weights_SA, pool: Pool, execution: ExecutionConfig, _share=1.0) -> Result:
    """Exact and dropless: only routed rows are computed, block by block (see models/moe/expert_loop.py)."""
    order = sort_by_expert(experts_SA, pool.computed.gate_EDF.shape[0])
    x_MD = gather_rows(x_SD, order)
    masters = tuple(pool.masters) if execution.expert_gradients else ()
    block_rows = expert_loop.rows_of_a_block(execution.block_rows, x_MD.shape[0], order.counts_E.shape[0])
    changes = pool.changes or {}
    grouped: Any = expert_loop.grouped_swiglu(
        x_MD, order.counts_E, tuple(pool.computed), masters, changes, block_rows, execution.products
    )
    y_MD, masters = grouped
    return combined(y_MD, weights_SA, order, pool._replace(masters=Experts(*masters)) if masters else pool)


def dispatch_ragged(x_SD, experts_SA, weights_SA, pool: Pool, execution: ExecutionConfig, share=1.0) -> Result:
    """Exact and dropless: jax.lax.ragged_dot over the sorted rows, a part at a time where most are elsewhere."""
    order = sort_by_expert(experts_SA, pool.computed.gate_EDF.shape[0])
    rows = chunks.rows_of_a_part(experts_SA.size, share)
    if rows == experts_SA.size:
        product = partial(jax.lax.ragged_dot, group_sizes=order.counts_E)
        return _sorted_rows(x_SD, weights_SA, order, pool, execution, product, share)
    experts, pool = borrow(pool, execution)
    found: Any = chunks.in_parts(
        _ragged_rows, rows, x_SD, weights_SA, order.order_M, order.counts_E, (experts, pool.changes)
    )
    y_SD, norm_SA, maximum_SA = found
    return Result(y_SD, pool, jnp.zeros(()), norm_SA, maximum_SA)


def _ragged_rows(rows_RD, counts_E, parameters) -> jax.Array:
    experts, changes = parameters
    return _experts_of_rows(rows_RD, counts_E, experts, changes, partial(jax.lax.ragged_dot, group_sizes=counts_E))


def dispatch_grouped(x_SD, experts_SA, weights_SA, pool: Pool, execution: ExecutionConfig, share=1.0) -> Result:
    """Exact and dropless: kernels over the sorted rows (models/moe/triton_kernels.py); adapter deltas are not fused."""
    from moe_reduce.models.moe import triton_kernels  # here only: a later jax may be without Pallas' Triton

    order = sort_by_expert(experts_SA, pool.computed.gate_EDF.shape[0])
    groups, interpret = triton_kernels.groups_of(order.counts_E, experts_SA.size), execution.platform != "gpu"
    if pool.changes:
        product = partial(triton_kernels.product, groups=groups, interpret=interpret)
        return _sorted_rows(x_SD, weights_SA, order, pool, execution, product, share)
    masters = tuple(pool.masters) if execution.expert_gradients else ()
    token_M = order.order_M // experts_SA.shape[1]
    results: Any = triton_kernels.swiglu(x_SD, token_M, order.rank_SA, groups, tuple(pool.computed), masters, interpret)
    y_MD, masters = results
    pool = pool._replace(masters=Experts(*masters)) if masters else pool
    y_MD = y_MD if share == 1 else _of_experts_here(y_MD, order.counts_E)
    return combined(y_MD, weights_SA, order, pool)


def _sorted_rows(x_SD, weights_SA, order: Order, pool: Pool, execution: ExecutionConfig, product: Grouped, share):
    """The experts as products of sorted rows with one matrix for each expert."""
    experts, pool = borrow(pool, execution)
    counts_E = None if share == 1 else order.counts_E
    y_MD = _experts_of_rows(gather_rows(x_SD, order), counts_E, experts, pool.changes, product)
    return combined(y_MD, weights_SA, order, pool)


def _experts_of_rows(rows_MD, counts_E, experts: Experts, changes: Changes | None, product: Grouped) -> jax.Array:
    """Sorted rows, of which counts_E are of each expert, -> what the experts make of them; 0 past the counts.

    counts_E: None where there is no row past them.
    """

    def multiply(rows_MI, matrices_EIO):
        matrices_EIO = matrices_EIO.astype(rows_MI.dtype)
        if counts_E is None:
            return checkpoint_name(product(rows_MI, matrices_EIO), products.KEPT)
        # of the rows too, for what comes back to them
        y_MO = product(_of_experts_here(rows_MI, counts_E), matrices_EIO)
        return _of_experts_here(checkpoint_name(y_MO, products.KEPT), counts_E)

    return _swiglu(rows_MD, experts, changes, multiply)


def _of_experts_here(rows_MI: jax.Array, counts_E: jax.Array) -> jax.Array:
    """Rows of experts elsewhere lie past the groups, where a kernel may leave anything: they become 0."""
    return jnp.where((jnp.arange(rows_MI.shape[0]) < jnp.sum(counts_E))[:, None], rows_MI, 0)


def _each_expert(rows_EXI: jax.Array, matrices_EIO: jax.Array) -> jax.Array:
    return jnp.einsum("EXI,EIO->EXO", rows_EXI, matrices_EIO.astype(rows_EXI.dtype))


def dispatch_capacity(x_SD, experts_SA, weights_SA, pool: Pool, execution: ExecutionConfig, share=1.0) -> Result:
    """At most capacity_factor · mean rows for each expert, in sorted order; what does not fit is dropped."""
    experts, pool = borrow(pool, execution)
    count = experts.gate_EDF.shape[0]
    order = sort_by_expert(experts_SA, count)
    assignments = experts_SA.size
    capacity = min(assignments, -(-int(assignments * execution.capacity_factor * share) // count))
    starts_E = jnp.cumsum(order.counts_E) - order.counts_E
    expert_M = experts_SA.reshape(-1)[order.order_M]
    position_M = jnp.arange(assignments, dtype=jnp.int32) - starts_E[jnp.minimum(expert_M, count - 1)]
    slot_M = jnp.where(position_M < capacity, expert_M * capacity + position_M, count * capacity)
    x_MD = gather_rows(x_SD, order)
    buffer = jnp.zeros((count * capacity, x_SD.shape[1]), x_SD.dtype).at[slot_M].set(x_MD, mode="drop")
    y_ECD = _swiglu(buffer.reshape(count, capacity, -1), experts, pool.changes, _each_expert)
    y_MD = y_ECD.reshape(count * capacity, -1).at[slot_M].get(mode="fill", fill_value=0)
    dropped = jnp.sum((expert_M < count) & (position_M >= capacity))
    return combined(y_MD, weights_SA, order, pool, dropped)


def dispatch_reference(x_SD, experts_SA, weights_SA, pool: Pool, execution: ExecutionConfig, _share=1.0) -> Result:
    """Every expert on every token, for tests: memory grows as E · S · F."""
    experts, pool = borrow(pool, execution)
    count = experts.gate_EDF.shape[0]
    y_ESD = _swiglu(jnp.broadcast_to(x_SD[None], (count, *x_SD.shape)), experts, pool.changes, _each_expert)
    chosen_SAE = jax.nn.one_hot(experts_SA, count, dtype=x_SD.dtype)
    y_SAD = jnp.einsum("SAE,ESD->SAD", chosen_SAE, y_ESD)
    y_SD = jnp.einsum("SA,SAD->SD", weights_SA.astype(x_SD.dtype), y_SAD)
    norm_SA = jnp.linalg.norm(y_SAD.astype(jnp.float32), axis=-1)
    return Result(y_SD, pool, jnp.zeros(()), norm_SA, jnp.max(jnp.abs(y_SAD.astype(jnp.float32)), axis=-1))


DISPATCHES: dict[str, Dispatch] = {
    "blocks": dispatch_blocks,
    "ragged": dispatch_ragged,
    "grouped": dispatch_grouped,
    "capacity": dispatch_capacity,
    "reference": dispatch_reference,
}
