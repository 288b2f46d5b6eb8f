"""The objectives of `tune`: an entry of OBJECTIVES is all that one needs.

A student is the model that a stage trains. Its teacher is the model that the reduction began with, unless the stage
names another one; a live teacher's parameters are frozen leaves below TEACHER.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import BalanceConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import TuneStage
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import only_record
from moe_reduce.reduction.canonical import canonical
from moe_reduce.reduction.transform import expert_count, moe_of
from moe_reduce.runs.stages.stage import StageContext
from moe_reduce.training.distillation import Distillation
from moe_reduce.training.losses import LossAndMetrics, collapse, next_token_loss
from moe_reduce.training.task import Batch, Params, never, split_teacher


class Objective(ABC):
    """A loss for reduced models, with the teacher that it needs and the settings that it excludes."""

    def check(self, stage: TuneStage, model: ModelConfig, first: ModelConfig) -> None:
        """Raise UserError when the stage's settings, or this model made from `first`, do not fit the objective."""
        del stage, model, first

    def teacher(self, stage: TuneStage, model: Model, context: StageContext) -> Model | None:
        """Return the teacher of a model; None if the loss runs no teacher."""
        del stage, model, context

    @abstractmethod
    def loss(
        self, student: Model, teacher: Model, stage: TuneStage, balance: BalanceConfig, params: Params, batch: Batch
    ) -> LossAndMetrics:
        """Compute the loss of a task. student, teacher: without parameters, which are in `params`."""

    def stop(self, student: ModelConfig, balance: BalanceConfig) -> Callable[[dict[str, float]], str | None]:
        """Make the rule that ends training early: when routing collapses, if there are experts."""
        return never if student.moe is None else partial(collapse, balance)


class LanguageModel(Objective):
    """The next token, mixed with the teacher's distribution by `teacher_weight`."""

    def teacher(self, stage: TuneStage, model: Model, context: StageContext) -> Model | None:
        """Return the first model, or the one that the stage names, if it runs in every step."""
        del model
        if stage.teacher_weight == 0 or stage.teacher_logits is not None:
            return None
        return context.load_first() if stage.teacher is None else context.load_teacher(stage.teacher)

    def loss(
        self, student: Model, teacher: Model, stage: TuneStage, balance: BalanceConfig, params: Params, batch: Batch
    ) -> LossAndMetrics:
        """Compute `next_token_loss` with the stage's distillation."""
        distillation = None
        if stage.teacher_weight > 0:
            live = None if stage.teacher_logits is not None else teacher
            distillation = Distillation(stage.distillation(""), live)
        return next_token_loss(student, balance, distillation, params, batch)


class RouterImitation(Objective):
    """The choice that each layer's router made among its home experts, learned by the router of a whole pool."""

    def check(self, stage: TuneStage, model: ModelConfig, first: ModelConfig) -> None:
        """Raise UserError unless routers alone train, in a pool of all the first model's experts."""
        if stage.teacher_weight:
            raise UserError("teacher_weight is for objective=language_model: leave it out")
        for name in ("adapter", "qat"):
            if getattr(stage, name):
                raise UserError(f"{name} learns nothing from objective=router: leave it out")
        if stage.components != "router":
            raise UserError("objective=router trains routers only: set components=router")
        pooled_here = moe_of(model).placement == "shared" and moe_of(first).placement == "layer"
        if not (pooled_here and moe_of(model).experts == expert_count(first)):
            raise UserError(
                "objective=router compares a whole pool with the routers it came from: put it before pruning"
            )

    def teacher(self, stage: TuneStage, model: Model, context: StageContext) -> Model | None:
        """Return the first model, in canonical form if the pool is, so that its routers read the same inputs."""
        del stage
        first = context.load_first()
        steps = model.chain[len(first.chain) :]
        return canonical(first) if any(step.arguments.get("canonical") for step in steps) else first

    def loss(
        self, student: Model, teacher: Model, stage: TuneStage, balance: BalanceConfig, params: Params, batch: Batch
    ) -> LossAndMetrics:
        """Sum KL(σ(R_i(x_i)) ‖ σ(G(x_i)[slice i])) over the experts of layer i; average over layers and tokens.

        R_i is the router of layer i in the teacher, x_i its input, and G the router of the pool. Slice i of its logits
        scores the experts whose home is layer i.
        """
        del stage, balance
        student_params, teacher_params = split_teacher(params)
        _, collected = teacher.with_params(teacher_params).apply(batch, collect=("hidden",))
        inputs_NBTD = collected["hidden"]["router_input"]
        wanted_NDE = trees.flatten(teacher_params)[only_record(teacher.config, "router").path]
        found_NDE = home_slices(student.config, student_params, teacher.config.expert_layers)

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

    def stop(self, student: ModelConfig, balance: BalanceConfig) -> Callable[[dict[str, float]], str | None]:
        """Never stop early: the loss routes no token through the student."""
        del student, balance
        return never


OBJECTIVES: dict[str, Objective] = {"language_model": LanguageModel(), "router": RouterImitation()}


def objective_of(stage: TuneStage) -> Objective:
    """Return the objective of a stage; raises UserError when its name is unknown."""
    if stage.objective not in OBJECTIVES:
        raise UserError(f"objective {stage.objective!r} is unknown; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[stage.objective]


def _bernoulli_divergence(wanted: jax.Array, found: jax.Array) -> jax.Array:
    """KL(σ(wanted) ‖ σ(found)) of logits, elementwise."""
    probability = jax.nn.sigmoid(wanted)
    if_true = jax.nn.log_sigmoid(wanted) - jax.nn.log_sigmoid(found)
    if_false = jax.nn.log_sigmoid(-wanted) - jax.nn.log_sigmoid(-found)
    return probability * if_true + (1 - probability) * if_false


def home_slices(model: ModelConfig, params: Params, layers: int) -> jax.Array:
    """Return the columns of a pool's routers for the experts whose home is each layer, [N, D, E].

    The pool must be unpruned, with its experts in the order of their home layers.
    """
    experts, record = moe_of(model).experts // layers, only_record(model, "router")
    router = trees.flatten(params)[record.path]
    if not record.stacked:  # [D, P]
        return jnp.moveaxis(router.reshape(router.shape[0], layers, experts), 1, 0)
    each_NDNE = router.reshape(layers, router.shape[1], layers, experts)
    return each_NDNE[np.arange(layers), :, np.arange(layers)]
