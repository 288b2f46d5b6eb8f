"""The mixture of experts: a router and an expert pool as modules, and the computation that uses them.

A layer that owns its experts and a layer that calls the shared pool run the same code; they differ in where the
parameters live, so router and pool hand out arrays and the computation takes them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_reduce.core.config import ExecutionConfig, ModelConfig, MoEConfig
from moe_reduce.models import deltas
from moe_reduce.models.layers import normal_init, residual_std
from moe_reduce.models.mesh import BATCH_AXES, on_one_device
from moe_reduce.models.moe.dispatch import DISPATCHES, Changes, Experts, Pool, Result, borrow
from moe_reduce.models.moe.exchange import exchange
from moe_reduce.models.moe.routing import only_real, route, router_logits

Route = Callable[[jax.Array, jax.Array, jax.Array, Pool, ExecutionConfig], Result]  # rows through their experts


class ExpertPool(nn.Module):
    """The matrices of E SwiGLU experts, and what an adapter adds to them."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> tuple[Experts, Changes]:
        moe = _moe(self.config)
        init = normal_init(self.config.init_std * moe.init_scale)
        init_down = normal_init(residual_std(self.config) * moe.init_scale)
        experts = Experts(
            self.param("gate", init, (moe.experts, self.config.width, moe.width)),
            self.param("up", init, (moe.experts, self.config.width, moe.width)),
            self.param("down", init_down, (moe.experts, moe.width, self.config.width)),
        )
        changes = {name: deltas.delta_of(self, name) for name in ("gate", "up", "down")}
        return experts, {name: delta for name, delta in changes.items() if delta is not None}


class Router(nn.Module):
    """The matrix of one linear router."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.config.width, _moe(self.config).experts)
        return self.param("weight", normal_init(self.config.init_std), shape)


def mixture_of_experts(
    x_BTD, pool: Pool, router_DE, bias_E, offset, moe: MoEConfig, execution: ExecutionConfig, real_BT=None
):
    """Σ over the chosen experts of weight · expert(x), [B, T, D], the pool to hand on, and the call's statistics.

    Returns (y_BTD, pool, statistics, assignments). Statistics: counts_E (assignments), probability_E (mean), z, dropped
    (share of assignments, 0 if dropless); of real tokens (`route`), and others take no place of a bounded capacity.
    Assignments, each [B, T, A]: expert, weight, and the norm and the largest
    magnitude of the expert's raw output.
    """
    batch, time, width = x_BTD.shape
    x_SD = x_BTD.reshape(batch * time, width)
    real_S = None if real_BT is None else real_BT.reshape(-1)
    routing = route(router_logits(x_SD, router_DE, offset, execution.products), bias_E, moe, real_S)
    chosen_BTA = routing.experts_SA.reshape(batch, time, moe.active)
    weights_BTA = routing.weights_SA.reshape(batch, time, moe.active)
    called_SA = routing.experts_SA
    if execution.dispatch == "capacity":
        called_SA = only_real(called_SA, real_S, moe.experts)
    y_BTD, pool, dropped, norm_BTA, maximum_BTA = apply_experts(
        x_BTD, called_SA.reshape(chosen_BTA.shape), weights_BTA, pool, execution
    )
    if real_S is not None:
        dropped = dropped * real_S.size / jnp.maximum(jnp.sum(real_S, dtype=jnp.float32), 1)
    statistics = {
        "counts_E": routing.counts_E,
        "probability_E": routing.probability_E,
        "z": routing.z,
        "dropped": dropped,
    }
    assignments = {"expert": chosen_BTA, "weight": weights_BTA, "norm": norm_BTA, "maximum": maximum_BTA}
    return y_BTD, pool, statistics, assignments


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None, "a mixture of experts needs ModelConfig.moe"
    return config.moe


def apply_experts(x_BTD, chosen_BTA, weights_BTA, pool: Pool, execution: ExecutionConfig):
    """(y_BTD, the pool to hand on, the share of assignments dropped, output norms_BTA and maxima_BTA).

    On one device, or over the mesh in context: tokens are split along the batch axes, experts along `expert` and their
    hidden width along `tensor`, over which slices of F are summed. Norms and maxima are of whole outputs only where
    `tensor` is 1.
    """
    if on_one_device():
        result = by_rows(DISPATCHES[execution.dispatch], x_BTD, chosen_BTA, weights_BTA, pool, execution)
        return result.y_SD, result.pool, result.dropped / chosen_BTA.size, *result[3:]
    tokens = PartitionSpec(BATCH_AXES)
    inward, outward = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor")
    changes = {name: _delta_specs(name, delta) for name, delta in (pool.changes or {}).items()}
    body = jax.shard_map(
        partial(_sharded_experts, execution=execution),
        in_specs=(tokens, tokens, tokens, (inward, inward, outward), changes),
        out_specs=(tokens, PartitionSpec(), tokens, tokens),
        check_vma=False,
    )
    experts, pool = borrow(pool, execution)
    y_BTD, dropped, norm_BTA, maximum_BTA = body(x_BTD, chosen_BTA, weights_BTA, tuple(experts), pool.changes or {})
    return y_BTD, pool, dropped / chosen_BTA.size, norm_BTA, maximum_BTA


def _delta_specs(name: str, delta: deltas.Delta) -> Any:
    """Where an adapter's leaves lie: with their experts, and along the hidden width as the matrix that they change."""
    hidden_side = "in" if name == "down" else "out"

    def spec(path: Any, leaf: jax.Array) -> PartitionSpec:
        keys = [part.key for part in path]
        axes: list[str | None] = [None] * leaf.ndim
        if keys[-1] == "matrix" and keys[0] == hidden_side:
            axes[-2 if name == "down" else -1] = "tensor"
        if leaf.ndim == 3:
            axes[0] = "expert"
        return PartitionSpec(*axes)

    return jax.tree_util.tree_map_with_path(spec, delta)


def _sharded_experts(x_BTD, chosen_BTA, weights_BTA, matrices, changes, execution: ExecutionConfig):
    pool = Pool.of(Experts(*matrices), x_BTD.dtype, changes)
    result = by_rows(exchange, x_BTD, chosen_BTA, weights_BTA, pool, execution)
    y_BTD = jax.lax.psum(result.y_SD, "tensor")
    dropped = jax.lax.psum(result.dropped, BATCH_AXES)
    norm_BTA = jax.lax.psum(jax.lax.stop_gradient(result.norm_SA), "tensor")
    return y_BTD, dropped, norm_BTA, jax.lax.pmax(jax.lax.stop_gradient(result.maximum_SA), "tensor")


def some_experts(
    x_BTD, chosen_BTA, weights_BTA, pool: Pool, execution: ExecutionConfig, first_expert: Any, share: float
) -> Result:
    """What a pool adds that starts at `first_expert` of all and holds this share of them; the others add nothing."""
    experts = pool.computed.gate_EDF.shape[0]
    chosen_BTA = chosen_BTA - first_expert
    chosen_BTA = jnp.where((chosen_BTA >= 0) & (chosen_BTA < experts), chosen_BTA, experts)

    def dispatch(x_SD, experts_SA, weights_SA, pool, execution):
        return DISPATCHES[execution.dispatch](x_SD, experts_SA, weights_SA, pool, execution, share)

    return by_rows(dispatch, x_BTD, chosen_BTA, weights_BTA, pool, execution)


def by_rows(dispatch: Route, x_BTD, chosen_BTA, weights_BTA, pool: Pool, execution: ExecutionConfig) -> Result:
    """A dispatch or an exchange, of batch and time as one axis: a Result whose rows are split again."""
    x_SD, chosen_SA, weights_SA = (array.reshape(-1, array.shape[-1]) for array in (x_BTD, chosen_BTA, weights_BTA))
    result = dispatch(x_SD, chosen_SA, weights_SA, pool, execution)
    norm_BTA, maximum_BTA = (size.reshape(chosen_BTA.shape) for size in (result.norm_SA, result.maximum_SA))
    return Result(result.y_SD.reshape(x_BTD.shape), result.pool, result.dropped, norm_BTA, maximum_BTA)
