"""Tasks for the loop that train a reduced model.

They train components on text and a teacher's logits, or fit a pool's router to the teacher's routers. The teacher is
the model that the reduction began with; its parameters are frozen leaves below TEACHER.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import adapter as adapters
from moe_reduce.core import trees
from moe_reduce.core.config import BalanceConfig, ModelConfig, TuneStage
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import (
    Records,
    abstract_params,
    by_path,
    counts_by_component,
    nested_under,
    only_record,
    record_at,
    records,
)
from moe_reduce.reduction.transform import transform
from moe_reduce.training.losses import collapse, evaluator, predict
from moe_reduce.training.task import TEACHER, Batch, Params, Task, never, no_change

BIAS = "router_bias"  # component that is annealed


def recovery_task(
    student: Model,
    teacher: ModelConfig,
    stage: TuneStage,
    balance: BalanceConfig,
    foreign_NE: np.ndarray | None = None,
) -> Task:
    """Return the task of a stage.

    student: the model without parameters, and how it computes. foreign_NE: True for experts that came from
    another layer, whose bias is annealed; None: no bias is annealed.
    """
    execution = dataclasses.replace(student.execution, expert_gradients="experts" in stage.components.split(","))
    student = dataclasses.replace(student, execution=execution)
    first = Model(teacher, {}, execution)
    evaluate = evaluator(student)
    if stage.objective == "router":
        loss = partial(_router_loss, student, first)
    else:
        loss = partial(_language_model_loss, student, first, stage.teacher_weight, balance)
    mixture = student.config.moe is not None
    return Task(
        loss=loss,
        evaluate=lambda params, batch: evaluate(_split(params)[0], batch),
        records=_records(student.config, teacher, stage),
        trainable=partial(trains, stage, student.config),
        after_step=no_change if foreign_NE is None else partial(_anneal, stage, student.config, foreign_NE),
        stop=partial(collapse, balance) if stage.objective == "language_model" and mixture else never,
    )


def _records(model: ModelConfig, teacher: ModelConfig, stage: TuneStage) -> Records:
    leaves = abstract_params(model)
    if stage.adapter is not None:
        leaves[ADAPTER] = adapters.abstract(stage.adapter, model)
    return records(model, leaves) | nested_under(TEACHER, by_path(teacher))


def trains(stage: TuneStage, model: ModelConfig, path: str) -> bool:
    """Return whether the stage changes a leaf, by training it or by annealing the bias."""
    if path.startswith(f"{ADAPTER}/"):
        return stage.adapter is not None and adapters.trained(stage.adapter, path)
    component = record_at(by_path(model), path).component
    return component in stage.components.split(",") or (component == BIAS and stage.bias_from is not None)


def check_components(stage: TuneStage, model: ModelConfig) -> None:
    """Raises UserError when the stage names a component that the model does not have."""
    known = counts_by_component(model)
    for name in stage.components.split(","):
        if name not in known:
            raise UserError(f"components={stage.components}: the model has no {name!r}; it has {', '.join(known)}")


def _split(params: Params) -> tuple[Params, Params]:
    """Split parameters into the student's and the teacher's."""
    student = dict(params)
    return student, student.pop(TEACHER, {})


def _language_model_loss(
    student: Model, teacher: Model, teacher_weight: float, balance: BalanceConfig, params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    student_params, teacher_params = _split(params)
    logits_BTV, penalty, metrics = predict(student.with_params(student_params), balance, batch)
    if teacher_weight == 0:
        return metrics["loss"] + penalty, metrics
    wanted_BTV, _ = teacher.with_params(teacher_params).apply(batch)
    divergence = mean_divergence(jax.lax.stop_gradient(wanted_BTV), logits_BTV, batch)
    total = (1 - teacher_weight) * metrics["loss"] + teacher_weight * divergence
    return total + penalty, metrics | {"teacher_divergence": divergence}


def mean_divergence(wanted_BTV: jax.Array, found_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean KL(wanted ‖ found) of the next-token distributions at the counted targets, nats a token."""
    wanted_BTV, found_BTV = jax.nn.log_softmax(wanted_BTV), jax.nn.log_softmax(found_BTV)
    divergence_BT = jnp.sum(jnp.exp(wanted_BTV) * (wanted_BTV - found_BTV), axis=-1)
    return jnp.sum(divergence_BT * batch["weights"]) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)


def _router_loss(
    student: Model, teacher: Model, params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ over a layer's experts of KL(σ(R_i(x_i)) ‖ σ(G(x_i)[slice i])), averaged over layers and tokens.

    x_i is the input of the router of layer i in the teacher, R_i that router, and G the router of the pool.
    """
    student_params, teacher_params = _split(params)
    _, collected = teacher.with_params(teacher_params).apply(batch, collect=("hidden",))
    inputs_NBTD = collected["hidden"]["router_input"]
    wanted_NDE = trees.flatten(teacher_params)[only_record(teacher.config, "router").path]
    found_NDE = home_slices(student.config, student_params, teacher.config.layers)

    def layer(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_BTD, wanted_DE, found_DE = arrays
        # as in models/moe/routing.py: true fp32
        project = partial(jnp.einsum, "BTD,DE->BTE", precision=jax.lax.Precision.HIGHEST)
        x_BTD = x_BTD.astype(jnp.float32)
        wanted_BTE = project(x_BTD, wanted_DE.astype(jnp.float32))
        divergence_BTE = _bernoulli_divergence(wanted_BTE, project(x_BTD, found_DE.astype(jnp.float32)))
        weights_BT = batch["weights"]
        return jnp.sum(jnp.sum(divergence_BTE, axis=-1) * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1.0)

    divergence = jnp.mean(jax.lax.map(layer, (inputs_NBTD, wanted_NDE, found_NDE)))
    return divergence, {"loss": divergence}


def _bernoulli_divergence(wanted: jax.Array, found: jax.Array) -> jax.Array:
    """KL(σ(wanted) ‖ σ(found)) of logits, elementwise."""
    share = jax.nn.sigmoid(wanted)
    chosen = jax.nn.log_sigmoid(wanted) - jax.nn.log_sigmoid(found)
    left = jax.nn.log_sigmoid(-wanted) - jax.nn.log_sigmoid(-found)
    return share * chosen + (1 - share) * left


def home_slices(model: ModelConfig, params: Params, layers: int) -> jax.Array:
    """Return the columns of a pool's routers for each layer's own experts, [N, D, E].

    The pool must be unpruned, with its experts in the order of their layers.
    """
    moe = model.moe
    assert moe is not None
    experts, record = moe.experts // layers, only_record(model, "router")
    router = trees.flatten(params)[record.path]
    if not record.stacked:  # [D, P]
        return jnp.moveaxis(router.reshape(router.shape[0], layers, experts), 1, 0)
    each_NDNE = router.reshape(layers, router.shape[1], layers, experts)
    return each_NDNE[np.arange(layers), :, np.arange(layers)]


def _anneal(
    stage: TuneStage, model: ModelConfig, foreign_NE: np.ndarray, params: Params, metrics: dict[str, jax.Array]
) -> Params:
    """Move the bias against experts of other layers one step towards its final value."""
    del metrics
    assert stage.bias_from is not None
    step = (stage.bias_from - stage.bias_to) / max(1, round(stage.steps * stage.anneal_share))
    path = only_record(model, BIAS).path
    bias_NE = trees.flatten(params)[path]
    moved_NE = jnp.minimum(bias_NE + jnp.float32(step), jnp.float32(-stage.bias_to))
    return trees.update(params, {path: jnp.where(foreign_NE, moved_NE, bias_NE)})


def start_annealing(model: Model, stage: TuneStage, foreign_NE: np.ndarray) -> Model:
    """Set the bias against experts of other layers to the value at which the stage begins."""
    assert stage.bias_from is not None
    strength = jnp.float32(-stage.bias_from)
    bias = only_record(model.config, BIAS)
    return transform(
        model, model.config, [bias], lambda leaves: {bias.path: jnp.where(foreign_NE, strength, leaves[bias.path])}
    )
