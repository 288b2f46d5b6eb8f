"""Tasks for the loop that train a reduced model: its components on text and on what the first model says, or its
routers on the choices of the first model's.

The first model's parameters travel as frozen leaves below `TEACHER`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import adapter as adapters
from moe_reduce.core import trees
from moe_reduce.core.config import BalanceConfig, ExecutionConfig, ModelConfig, TuneStage
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Records, abstract_params, below, by_path, counts_by_component, lookup, records
from moe_reduce.training.losses import collapse, evaluator, predict
from moe_reduce.training.task import TEACHER, Batch, Params, Task, never, no_change

BIAS = "layers/router_bias"


def tuning_task(
    model: ModelConfig,
    teacher: ModelConfig,
    stage: TuneStage,
    execution: ExecutionConfig,
    balance: BalanceConfig,
    foreign_NE: np.ndarray | None = None,
) -> Task:
    """What a stage trains. foreign_NE: where the annealed bias lies, of experts that are another layer's by origin."""
    trained = stage.components.split(",")
    execution = dataclasses.replace(execution, expert_gradients="experts" in trained)
    student = Model(model, {}, execution)
    evaluate = evaluator(student)
    if stage.objective == "router":
        loss = partial(_router_loss, model, teacher, execution)
    else:
        loss = partial(_language_model_loss, student, Model(teacher, {}, execution), stage.teacher_weight, balance)
    return Task(
        loss=loss,
        evaluate=lambda params, batch: evaluate(_split(params)[0], batch),
        records=_records(model, teacher, stage),
        trainable=partial(trains, stage, model),
        after_step=no_change if foreign_NE is None else partial(_anneal, stage, foreign_NE),
        stop=partial(collapse, balance) if stage.objective == "language_model" and model.moe else never,
    )


def _records(model: ModelConfig, teacher: ModelConfig, stage: TuneStage) -> Records:
    leaves = abstract_params(model)
    if stage.adapter is not None:
        leaves[ADAPTER] = adapters.abstract(stage.adapter, model)
    return records(model, leaves) | below(TEACHER, by_path(teacher))


def trains(stage: TuneStage, model: ModelConfig, path: str) -> bool:
    """Whether the stage changes the leaf; the bias is among them where it is annealed, and has no gradient."""
    if path.startswith(f"{ADAPTER}/"):
        return stage.adapter is not None and adapters.trained(stage.adapter, path)
    component = lookup(by_path(model), path).component
    return component in stage.components.split(",") or (path == BIAS and stage.bias_from is not None)


def check_components(path: str, stage: TuneStage, model: ModelConfig) -> None:
    """Raises UserError when a named component is not one of the model's."""
    known = counts_by_component(model)
    for name in stage.components.split(","):
        if name not in known:
            raise UserError(f"{path}.components: the model has no {name!r}; it has {', '.join(known)}")


def _split(params: Params) -> tuple[Params, Params]:
    """(the model's own leaves, the first model's)."""
    own = dict(params)
    return own, own.pop(TEACHER, {})


def _language_model_loss(
    student: Model, teacher: Model, teacher_weight: float, balance: BalanceConfig, params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    own, first = _split(params)
    logits_BTV, penalty, metrics = predict(student.with_params(own), balance, batch)
    if teacher_weight == 0:
        return metrics["loss"] + penalty, metrics
    wanted, _ = teacher.with_params(first).apply(batch)
    divergence = mean_divergence(jax.lax.stop_gradient(wanted), logits_BTV, batch)
    total = (1 - teacher_weight) * metrics["loss"] + teacher_weight * divergence
    return total + penalty, metrics | {"teacher_divergence": divergence}


def mean_divergence(wanted_BTV: jax.Array, found_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean KL(wanted ‖ found) of the next-token distributions at the counted targets, nats a token."""
    wanted_BTV, found_BTV = jax.nn.log_softmax(wanted_BTV), jax.nn.log_softmax(found_BTV)
    divergence_BT = jnp.sum(jnp.exp(wanted_BTV) * (wanted_BTV - found_BTV), axis=-1)
    return jnp.sum(divergence_BT * batch["weights"]) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)


def _router_loss(
    model: ModelConfig, teacher: ModelConfig, execution: ExecutionConfig, params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ over a layer's experts of KL(σ(R_i(x_i)) ‖ σ(G(x_i)[slice i])), averaged over layers and tokens.

    x_i is what the router of layer i reads in the first model, R_i that router, G the pool's.
    """
    own, first = _split(params)
    _, collected = Model(teacher, first, execution).apply(batch, collect=("hidden",))
    inputs_NBTD = collected["hidden"]["router_input"]
    wanted_NDE = first["layers"]["router"]["weight"]

    def layer(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_BTD, wanted_DE, found_DE = arrays
        # as in models/moe/routing.py: true fp32
        project = partial(jnp.einsum, "BTD,DE->BTE", precision=jax.lax.Precision.HIGHEST)
        x_BTD = x_BTD.astype(jnp.float32)
        wanted_BTE = project(x_BTD, wanted_DE.astype(jnp.float32))
        divergence_BTE = _bernoulli_divergence(wanted_BTE, project(x_BTD, found_DE.astype(jnp.float32)))
        weights_BT = batch["weights"]
        return jnp.sum(jnp.sum(divergence_BTE, axis=-1) * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1.0)

    divergence = jnp.mean(jax.lax.map(layer, (inputs_NBTD, wanted_NDE, own_slices(model, own, teacher.layers))))
    return divergence, {"loss": divergence}


def _bernoulli_divergence(wanted: jax.Array, found: jax.Array) -> jax.Array:
    """KL(σ(wanted) ‖ σ(found)) of logits."""
    share = jax.nn.sigmoid(wanted)
    chosen = jax.nn.log_sigmoid(wanted) - jax.nn.log_sigmoid(found)
    left = jax.nn.log_sigmoid(-wanted) - jax.nn.log_sigmoid(-found)
    return share * chosen + (1 - share) * left


def own_slices(model: ModelConfig, params: Params, layers: int) -> jax.Array:
    """What a pool's routers say about each layer's own experts, [N, D, E], of an unpruned pool in its first order."""
    moe = model.moe
    assert moe is not None
    experts = moe.experts // layers
    if moe.router == "shared":
        router_DP = params["router"]["weight"]
        return jnp.moveaxis(router_DP.reshape(router_DP.shape[0], layers, experts), 1, 0)
    router_NDP = params["layers"]["router"]["weight"]
    each_NDNE = router_NDP.reshape(layers, router_NDP.shape[1], layers, experts)
    return each_NDNE[np.arange(layers), :, np.arange(layers)]


def _anneal(stage: TuneStage, foreign_NE: np.ndarray, params: Params, metrics: dict[str, jax.Array]) -> Params:
    """The bias against other layers' experts, one step closer to where it ends."""
    del metrics
    assert stage.bias_from is not None
    step = (stage.bias_from - stage.bias_to) / max(1, round(stage.steps * stage.anneal_share))
    (bias_NE,) = trees.select(params, BIAS, expect=1).values()
    moved_NE = jnp.minimum(bias_NE + jnp.float32(step), jnp.float32(-stage.bias_to))
    return trees.update(params, {BIAS: jnp.where(foreign_NE, moved_NE, bias_NE)})


def start_annealing(params: Params, stage: TuneStage, foreign_NE: np.ndarray) -> Params:
    """The model's leaves with the bias where the stage begins."""
    assert stage.bias_from is not None
    (bias_NE,) = trees.select(params, BIAS, expect=1).values()
    return trees.update(params, {BIAS: jnp.where(foreign_NE, jnp.float32(-stage.bias_from), bias_NE)})
