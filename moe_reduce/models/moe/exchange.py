"""Exchange of tokens between the devices of the `expert` axis, inside shard_map. Each device holds tokens and experts.

    gather      each device receives the tokens of all devices and sends back its experts' partial sums
    all_to_all  each assignment's row goes to the device of its expert, and the expert's output comes back

Both are dropless. With n devices, gather sends a token n - 1 times, all_to_all A · (n - 1) / n times on average. Both
take the arguments of a Dispatch, with groups numbered over all devices, and return the Result of the device's own
tokens. In `_padded` and `_ragged`, arrays without a letter begin with an axis of devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models import products
from moe_reduce.models.moe.assignments import Result, combined, gather_rows, sort_by_group
from moe_reduce.models.moe.dispatch import DISPATCHES, Assigned
from moe_reduce.models.moe.experts import Experts, Masters

AXIS = "expert"


def exchange(rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig) -> Result:
    """Sum over each token's experts, which may be on any device of the axis. A single device exchanges nothing."""
    devices = jax.lax.axis_size(AXIS)
    if devices == 1:
        return DISPATCHES[execution.dispatch](rows, experts, masters, execution)
    kind = execution.exchange
    if kind == "auto":
        # on CPU all_to_all pads its buffers, which become as large as those of gather
        fewer_rows = devices > rows.groups_SA.shape[1] and execution.platform != "cpu"
        kind = "all_to_all" if fewer_rows else "gather"
    return {"gather": _gather, "all_to_all": _all_to_all}[kind](rows, experts, masters, execution)


def _gather(rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig) -> Result:
    count = experts.groups
    every = partial(jax.lax.all_gather, axis_name=AXIS, axis=0, tiled=True)
    here_SA = every(rows.groups_SA) - jax.lax.axis_index(AXIS) * count
    here_SA = jnp.where((here_SA >= 0) & (here_SA < count), here_SA, count)
    share = 1.0 / jax.lax.axis_size(AXIS)
    gathered = Assigned(every(rows.x_SD), here_SA, every(rows.weights_SA))
    result = DISPATCHES[execution.dispatch](gathered, experts, masters, execution, share)
    total = partial(jax.lax.psum_scatter, axis_name=AXIS, scatter_dimension=0, tiled=True)
    # an assignment's sizes are 0 on all devices but that of its expert, so their sum is right
    sizes = jax.tree.map(total, jax.lax.stop_gradient(result.sizes))
    return Result(total(result.y_SD), result.masters, result.dropped, sizes)


def _all_to_all(rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig) -> Result:
    x_SD, groups_SA, weights_SA = rows
    count, devices, active = experts.groups, jax.lax.axis_size(AXIS), groups_SA.shape[1]
    order = sort_by_group(groups_SA, count * devices)
    together = min(active, experts.number)  # most rows of one token on one device, since a token's experts are distinct
    most = groups_SA.shape[0] * together
    make = _padded if execution.platform == "cpu" else _ragged
    to_experts, to_tokens = make(jnp.sum(order.counts_J.reshape(devices, count), axis=1), groups_SA.size, most)
    numbers_M1 = (groups_SA.reshape(-1)[order.order_M] % count)[:, None]
    arrived_R1 = to_experts(numbers_M1, count)
    arrived_RD = checkpoint_name(to_experts(gather_rows(x_SD, order), 0), products.REMAT_SAVED)
    share = active / (devices * together)  # expected share of the buffer in use
    ones_R1 = jnp.ones(arrived_R1.shape, weights_SA.dtype)
    arrived = Assigned(arrived_RD, arrived_R1, ones_R1)
    result = DISPATCHES[execution.dispatch](arrived, experts, masters, execution, share)
    y_MD = checkpoint_name(to_tokens(result.y_SD), products.REMAT_SAVED)
    return combined(y_MD, weights_SA, order, result.masters, result.dropped)


class Routes(NamedTuple):
    """The two directions of an exchange of rows.

    to_experts(rows_MI, fill) -> rows_RI: send rows; returns those that this device receives, in order of arrival, and
        `fill` in empty rows.
    to_tokens(rows_RI) -> rows_MI: send the received rows back; returns this device's own rows in their first order.
    """

    to_experts: Callable[[jax.Array, Any], jax.Array]
    to_tokens: Callable[[jax.Array], jax.Array]


def _padded(sent: jax.Array, total: int, rows: int) -> Routes:
    """Routes of `total` rows, sorted by destination: device i gets sent[i] of them and has `rows` slots per sender."""
    devices = sent.shape[0]
    ends = jnp.cumsum(sent)
    starts = ends - sent
    slots_R = jnp.arange(rows, dtype=jnp.int32)
    swap = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0)

    def to_experts(rows_MI: jax.Array, fill: Any) -> jax.Array:
        source = jnp.minimum(starts[:, None] + slots_R[None], total - 1)  # [devices, R]
        used = (slots_R[None] < sent[:, None])[:, :, None]
        buffer = jnp.where(used, rows_MI[source], jnp.asarray(fill, rows_MI.dtype))
        return swap(buffer).reshape(devices * rows, -1)

    def to_tokens(rows_RI: jax.Array) -> jax.Array:
        back_RI = swap(rows_RI.reshape(devices, rows, -1)).reshape(devices * rows, -1)
        number_M = jnp.arange(total, dtype=jnp.int32)
        device_M = jnp.searchsorted(ends, number_M, side="right").astype(jnp.int32)
        # assignments without an expert come last and are not sent: their index is past the buffer, so they get 0
        return back_RI.at[device_M * rows + number_M - starts[device_M]].get(mode="fill", fill_value=0)

    return Routes(to_experts, to_tokens)


def _ragged(sent: jax.Array, total: int, rows: int) -> Routes:
    """Routes like those of `_padded`, without padding: only used rows are sent, and they arrive without gaps."""
    devices = sent.shape[0]
    here = jax.lax.axis_index(AXIS)
    table = jax.lax.all_gather(sent, AXIS)  # rows sent, [from, to]
    received = table[:, here]
    starts = jnp.cumsum(table, axis=1) - table  # first of these rows in the sender's buffer, [from, to]
    arrivals = jnp.cumsum(table, axis=0) - table  # the same in the receiver's buffer

    def to_experts(rows_MI: jax.Array, fill: Any) -> jax.Array:
        empty = jnp.full((devices * rows, rows_MI.shape[1]), fill, rows_MI.dtype)
        return _move(rows_MI, empty, starts[here], sent, arrivals[here], received)

    def to_tokens(rows_RI: jax.Array) -> jax.Array:
        empty = jnp.zeros((total, rows_RI.shape[1]), rows_RI.dtype)
        return _move(rows_RI, empty, arrivals[:, here], received, starts[:, here], sent)

    return Routes(to_experts, to_tokens)


def _move(rows, empty, starts, sizes, arrivals, received) -> jax.Array:
    return jax.lax.ragged_all_to_all(rows, empty, starts, sizes, arrivals, received, axis_name=AXIS)
