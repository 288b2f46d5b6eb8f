"""All experts of a per-layer MoE in one shared pool, without changing what the model computes.

This is our own derivation. If each layer has n experts, expert e of layer l becomes expert l·n + e of the pool; l is
its home layer, and in every other layer it is foreign. The pool's router is the concatenation of the layers' routers.
Each layer has a selection bias over the pool, 0 on its home experts and -c on foreign ones. With c above any difference
of logits, the pooled model computes the original logits. This holds for sigmoid scores and for softmax scores that are
renormalised over the chosen experts, because neither depends on experts that are not chosen; for other softmax scores
the bias acts on the logits, so that foreign experts add nothing to the denominator. To turn renormalised softmax scores
into sigmoid ones, each layer subtracts an offset t from its logits z: if z is far below t, σ(z - t) ≈ e^(z - t), so
that renormalised combine weights equal those of softmax up to a relative error of about e^(max z - t). Training then
brings c to 0, so that layers may choose foreign experts too.

A block beside the experts, and dense layers before them, stay as they are. N counts the layers that have experts, and E
the experts of the pool.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, only_record, parameters, select
from moe_reduce.reduction.canonical import canonical, check_per_layer
from moe_reduce.reduction.transform import Leaves, expert_count, moe_of, transform

# c of the lossless start: above any difference of logits, but small enough that logit - c has steps of 0.001 in fp32
LOSSLESS_BIAS = 1e4
POOLED = ("experts", "router", "router_bias", "score_offset")  # components whose parameters the pool replaces


def pool(model: Model, options: PoolStage, seed: int = 0) -> Model:
    """Move all experts into one pool; attention and norms stay in their layers.

    options.start: `lossless` (concatenated routers, a bias of -c on foreign experts), `concat` (the same without a
    bias) or `random` (a new router, no bias). options.router: one for all layers, or one for each. options.bias: c in
    units of the logits; None means LOSSLESS_BIAS, with which no foreign expert is chosen. options.score_function: that
    of the pool; a model with sigmoid scores keeps them. options.offset: t of sigmoid scores made of softmax ones, the
    same in each layer. options.canonical: first bring the model into canonical form. seed: seeds a random router and
    the random inputs of the canonical form. Raises UserError when the model has no per-layer experts, when the pool's
    scores cannot reproduce its combine weights, or when the options contradict each other.
    """
    check_options(options)
    _check_poolable(model.config, options)
    model = canonical(model, seed) if options.canonical else model
    config = _pooled(model.config, options)
    old, new = (_by_name(each, "experts") for each in (model.config, config))
    routers = _by_name(config, "router")
    strength = (LOSSLESS_BIAS if options.bias is None else options.bias) if options.start == "lossless" else 0.0

    def concatenate(leaves: Leaves) -> Leaves:
        pooled = {new[name].path: leaves[old[name].path].reshape(new[name].shape) for name in new}
        for name, old_router in _by_name(model.config, "router").items():
            router, record = leaves[old_router.path], routers[name]
            if options.start == "random":
                std = config.init_std if record.is_matrix else 0.0
                fresh = std * jax.random.normal(jax.random.key(seed), record.shape, jnp.float32)
                pooled[record.path] = fresh.astype(router.dtype)
            else:
                pooled[record.path] = _concatenated(router, record)
        pooled[only_record(config, "router_bias").path] = _selection_bias(model.config, leaves, strength)
        if moe_of(config).score_offset:
            offset = only_record(config, "score_offset")
            pooled[offset.path] = leaves.get(offset.path, jnp.full(offset.shape, options.offset, jnp.float32))
        return pooled

    replaced = [record for record in parameters(model.config) if record.component in POOLED]
    return transform(model, config, replaced, concatenate)


def _pooled(config: ModelConfig, options: PoolStage) -> ModelConfig:
    moe = moe_of(config)
    made_sigmoid = moe.score_function == "softmax" and options.score_function == "sigmoid"
    moe = dataclasses.replace(
        moe,
        experts=expert_count(config),
        placement="shared",
        router=options.router,
        selection_bias=True,
        score_function="sigmoid" if made_sigmoid else moe.score_function,
        score_offset=made_sigmoid or moe.score_offset,
        bias_on="logits" if _depends_on_all(moe) else moe.bias_on,
        groups=config.expert_layers * moe.groups if moe.groups > 1 else 1,
    )
    return dataclasses.replace(config, moe=moe)


def _depends_on_all(moe: MoEConfig) -> bool:
    """True if combine weights depend on the experts that are not chosen too."""
    return moe.score_function == "softmax" and not moe.normalize


def _by_name(config: ModelConfig, component: str) -> dict[str, Parameter]:
    return {record.name: record for record in select(config, component=component)}


def _concatenated(router: jax.Array, pooled: Parameter) -> jax.Array:
    """Routers [N, D, E], or biases [N, E], side by side in layer order; with one for each layer, N copies of that."""
    joined = jnp.moveaxis(router, 0, -2).reshape(*router.shape[1:-1], -1)
    return jnp.broadcast_to(joined[None], pooled.shape) if pooled.stacked else joined


def _selection_bias(config: ModelConfig, leaves: Leaves, strength: float) -> jax.Array:
    """Selection bias, fp32 [N, E]: -strength on foreign experts; on home experts, the bias that their layer had."""
    sizes = (moe_of(config).experts,) * config.expert_layers
    bias_NE = jnp.asarray(foreign_bias(sizes, strength))
    if not moe_of(config).selection_bias:
        return bias_NE
    before = leaves[only_record(config, "router_bias").path].astype(jnp.float32)  # [N, experts of a layer]
    return jnp.where(home_experts(sizes), before.reshape(1, -1), bias_NE)


def home_experts(sizes: Sequence[int]) -> np.ndarray:
    """Mask of the home experts of each layer of a pool, [N, E]; the pool holds sizes[0] of layer 0 first, and so on."""
    layers = np.arange(len(sizes))
    return layers[:, None] == np.repeat(layers, sizes)[None]


def foreign_bias(sizes: Sequence[int], strength: float) -> np.ndarray:
    """Bias 0 on a layer's home experts and -strength on all others, fp32 [N, E]; sizes: as in `home_experts`."""
    return np.where(home_experts(sizes), np.float32(0), np.float32(-strength))


def check_options(options: PoolStage) -> None:
    """Raises UserError when the bias or the offset would have no effect, or is out of range."""
    start, score_function, bias, offset = options.start, options.score_function, options.bias, options.offset
    if bias is not None and start != "lossless":
        raise UserError(f"a bias is for start=lossless, but start={start}: leave one of them out")
    if bias is not None and not 0 <= bias < math.inf:
        raise UserError(f"bias={bias} must be 0 or above: it is subtracted from the logits of foreign experts")
    if offset != 0 and score_function != "sigmoid":
        raise UserError(f"an offset is for sigmoid scores, but score_function={score_function}: leave one of them out")
    if not math.isfinite(offset):
        raise UserError(f"offset={offset} must be finite: it is subtracted from logits")


def _check_poolable(config: ModelConfig, options: PoolStage) -> None:
    check_per_layer(config)
    moe = moe_of(config)
    if not _depends_on_all(moe):
        return
    if options.score_function == "sigmoid":
        raise UserError(
            "the weights of this model are not renormalised over the chosen experts (norm_topk_prob is false), which "
            "sigmoid scores cannot reproduce: pool it with score_function=softmax"
        )
    if moe.selection_bias and moe.bias_on != "logits":
        raise UserError(
            "the weights of this model are not renormalised over the chosen experts, and it has a selection bias, "
            "which a pool cannot reproduce: choose a model without one"
        )
