"""The task of a `tune` stage for the training loop: its objective, the leaves that train, and the annealed bias."""

import dataclasses
from functools import partial

import numpy as np

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters.dropout import while_training
from moe_reduce.core.config import BalanceConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import TuneStage
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import (
    ROUTER_BIAS,
    Records,
    abstract_params,
    by_path,
    counts_by_component,
    nested_under,
    record_at,
    records,
)
from moe_reduce.runs.stages.annealing import anneal
from moe_reduce.runs.stages.objectives import objective_of
from moe_reduce.training.losses import evaluator
from moe_reduce.training.task import TEACHER, Task, no_change


def recovery_task(
    student: Model,
    teacher: ModelConfig,
    stage: TuneStage,
    balance: BalanceConfig,
    foreign_NE: np.ndarray | None = None,
) -> Task:
    """Return the task of a stage.

    student: the model that trains, without parameters. foreign_NE: mask of the experts whose bias is annealed, as
    `foreign_experts` returns it; None: no bias is annealed.
    """
    execution = dataclasses.replace(student.execution, expert_gradients="experts" in stage.components.split(","))
    student = dataclasses.replace(student, execution=execution)
    objective = objective_of(stage)
    task_loss = partial(objective.loss, student, Model(teacher, {}, execution), stage, balance)
    return Task(
        loss=lambda params, batch: task_loss(while_training(stage.adapter, params, batch), batch),
        evaluate=evaluator(student),
        records=_records(student.config, teacher, stage),
        trainable=partial(trains, stage, student.config),
        after_step=no_change if foreign_NE is None else partial(anneal, stage, foreign_NE),
        stop=objective.stop(student.config, balance),
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
    return component in stage.components.split(",") or (path == ROUTER_BIAS and stage.bias_from is not None)


def check_components(stage: TuneStage, model: ModelConfig) -> None:
    """Raises UserError when the stage names a component that the model does not have."""
    known = counts_by_component(model)
    for name in stage.components.split(","):
        if name not in known:
            raise UserError(f"components={stage.components}: the model has no {name!r}; it has {', '.join(known)}")
