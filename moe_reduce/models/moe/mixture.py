"""The mixture of experts of one block: routing, then the weighted sum over the chosen experts.

A layer with its own experts and a layer that calls the shared pool run the same code: they differ only in where their
parameters are. So linen modules only return weights, and the functions here compute with them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_reduce.core.config import ExecutionConfig, MoEConfig
from moe_reduce.models.deltas import Delta, entries
from moe_reduce.models.mesh import BATCH_AXES, on_one_device
from moe_reduce.models.moe.assignments import Result, Sizes
from moe_reduce.models.moe.dispatch import DISPATCHES, Assigned
from moe_reduce.models.moe.exchange import exchange
from moe_reduce.models.moe.experts import Experts, Masters, cast_experts, with_master_gradients
from moe_reduce.models.moe.routing import RouterWeights, Routing, only_real, route
from moe_reduce.models.weights import Weight

Run = Callable[[Assigned, Experts, Masters, ExecutionConfig], Result]


def choose_experts(
    x_BTD: jax.Array, router: RouterWeights, moe: MoEConfig, real_BT: jax.Array | None = None
) -> Routing:
    """Routing of every token, [S, A], with statistics of real tokens only."""
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    return route(router.logits(x_SD), router.bias_E, moe, None if real_BT is None else real_BT.reshape(-1))


def mixture_of_experts(
    x_BTD: jax.Array, routing: Routing, experts: Experts, masters: Masters, execution: ExecutionConfig, real_BT=None
):
    """(y_BTD = Σ weight · expert(x) over the chosen experts, masters for the next call, statistics, assignments).

    statistics: counts_E, probability_E and z of Routing, and dropped (share of assignments; 0 if dropless), all of real
    tokens only. assignments, each [B, T, A]: expert, weight, and the Sizes (norm, maximum, largest) of the expert's
    output before it is weighted. Padding uses none of an expert's capacity.
    """
    shape = (*x_BTD.shape[:2], routing.experts_SA.shape[1])
    chosen_BTA, weights_BTA = routing.experts_SA.reshape(shape), routing.weights_SA.reshape(shape)
    called_BTA = chosen_BTA
    if execution.dispatch == "capacity":
        real_S = None if real_BT is None else real_BT.reshape(-1)
        called_BTA = only_real(routing.experts_SA, real_S, experts.number).reshape(shape)
    experts, groups_BTA = experts.group_rows(called_BTA)
    rows = Assigned(x_BTD, groups_BTA, weights_BTA)
    y_BTD, masters, dropped, sizes = apply_experts(rows, experts, masters, execution)
    if real_BT is not None:
        dropped = dropped * real_BT.size / jnp.maximum(jnp.sum(real_BT, dtype=jnp.float32), 1)
    assignments = {"expert": chosen_BTA, "weight": weights_BTA} | sizes._asdict()
    return y_BTD, masters, routing.statistics() | {"dropped": dropped}, assignments


def apply_experts(rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig):
    """(y_BTD, masters for the next call, share of assignments dropped, Sizes of the outputs [B, T, A]).

    rows: with batch and time as leading axes. On a mesh, tokens are split along the batch axes, experts along `expert`
    and their width F along `tensor`, over which outputs are summed. If `tensor` is larger than 1, Sizes are those of
    partial outputs, added or maximised, and not those of the sum.
    """
    assignments = rows.groups_SA.size
    if on_one_device():
        result = _flattened(DISPATCHES[execution.dispatch], rows, experts, masters, execution)
        return result.y_SD, result.masters, result.dropped / assignments, result.sizes
    tokens = PartitionSpec(BATCH_AXES)
    experts, masters = with_master_gradients(experts, masters)
    body = jax.shard_map(
        partial(_sharded, execution=execution),
        in_specs=(tokens, _specs(experts)),
        out_specs=(tokens, PartitionSpec(), tokens),
        check_vma=False,
    )
    y_BTD, dropped, sizes = body(rows, experts)
    return y_BTD, masters, dropped / assignments, sizes


def _specs(experts: Experts) -> Any:
    """Partition specs of experts' leaves: split by expert along `expert`, and by width F along `tensor`."""

    def value(spec: PartitionSpec, one: Weight) -> Any:
        # a quantised value's scales [E, O] lack the contracted axis
        scales = PartitionSpec("expert", spec[2] if len(spec) > 2 else None)
        return jax.tree.map(lambda leaf: spec if leaf.ndim == 3 else scales, one.value)

    inward, outward = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor")
    placed = {}
    for name, one in experts.matrices.items():
        spec = outward if name == "down" else inward
        delta = None if one.delta is None else _delta_specs(name, one.delta)
        placed[name] = Weight(value(spec, one), delta, one.input_axes, one.layout, one.fp32_products)
    biases = (inward, inward, PartitionSpec("expert")) if experts.biases else ()
    return experts._replace(**placed, biases=biases)


def _delta_specs(name: str, delta: Delta) -> Any:
    """Partition specs of an adapter's or a bank's leaves: split by expert, and by width F as their matrix is."""
    hidden_side, per_expert = "in" if name == "down" else "out", 4 if entries(delta) else 3

    def spec(path: Any, leaf: jax.Array) -> PartitionSpec:
        keys = [part.key for part in path]
        axes: list[str | None] = [None] * leaf.ndim
        if keys[-1] == "matrix" and keys[0] == hidden_side:
            axes[-2 if name == "down" else -1] = "tensor"
        if leaf.ndim == per_expert:
            axes[0] = "expert"
        return PartitionSpec(*axes)

    return jax.tree_util.tree_map_with_path(spec, delta)


def _sharded(rows: Assigned, experts: Experts, execution: ExecutionConfig):
    experts = experts.with_bias_share(1 / jax.lax.axis_size("tensor"))  # outputs are summed over this axis
    experts, masters = cast_experts(experts, rows.x_SD.dtype, execution.expert_gradients)
    result = _flattened(exchange, rows, experts, masters, execution)
    y_BTD = jax.lax.psum(result.y_SD, "tensor")
    dropped = jax.lax.psum(result.dropped, BATCH_AXES)
    norm, *maxima = jax.lax.stop_gradient(result.sizes)
    maxima = (jax.lax.pmax(size, "tensor") for size in maxima)
    return y_BTD, dropped, Sizes(jax.lax.psum(norm, "tensor"), *maxima)


def some_experts(
    rows: Assigned, experts: Experts, execution: ExecutionConfig, first_expert: Any, share: float
) -> Result:
    """Sum over some of a layer's experts, which are frozen and numbered from `first_expert`.

    share: their fraction of the layer's experts. rows: with batch and time as leading axes. The experts have no bank of
    adapters.
    """
    here_BTA = rows.groups_SA - first_expert
    here_BTA = jnp.where((here_BTA >= 0) & (here_BTA < experts.number), here_BTA, experts.number)

    def dispatch(rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig) -> Result:
        return DISPATCHES[execution.dispatch](rows, experts, masters, execution, share)

    return _flattened(dispatch, rows._replace(groups_SA=here_BTA), experts, (), execution)


def _flattened(run: Run, rows: Assigned, experts: Experts, masters: Masters, execution: ExecutionConfig) -> Result:
    """Run a dispatch or exchange on rows [B·T, …]; its Result has the axes B and T again."""
    flat = Assigned(*(array.reshape(-1, array.shape[-1]) for array in rows))
    result = run(flat, experts, masters, execution)
    sizes = Sizes(*(size.reshape(rows.groups_SA.shape) for size in result.sizes))
    return Result(result.y_SD.reshape(rows.x_SD.shape), result.masters, result.dropped, sizes)
