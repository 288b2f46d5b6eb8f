"""The stages of a reduction, and the plan of a reduction: its stages applied to abstract leaves.

A kind of stage is its dataclass in core/stages.py, one module of this package, and an entry of KINDS.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig, ReduceConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.core.stages import StageConfig
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.reduction.transform import abstract_model
from moe_reduce.runs.stages.pool import Pool
from moe_reduce.runs.stages.prune import Prune
from moe_reduce.runs.stages.quantize import Quantize
from moe_reduce.runs.stages.stage import Result, RunContext, Stage, StageContext
from moe_reduce.runs.stages.tune import Tune
from moe_reduce.runs.teaching import abstract_teacher
from moe_reduce.storage import manifest
from moe_reduce.training.job import Job

KINDS = {"pool": Pool, "prune": Prune, "quantize": Quantize, "tune": Tune}  # by the `kind` of their configuration


def stage_of(entry: StageConfig) -> Stage:
    """Return the stage of an entry of the configuration."""
    return KINDS[entry.kind](entry)


def run_stage(entry: StageConfig, model: Model, context: RunContext) -> Result:
    """Apply the stage of an entry of the configuration to arrays."""
    return stage_of(entry).run(model, context)


def configurations(first: ModelConfig, run: ReduceConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yield the name of each stage and the architecture after it.

    first: architecture of the model that the reduction begins with. Raises UserError, which names the stage, when one
    cannot follow the stages before it.
    """
    for context, _, changed in _planned(first, run, jnp.float32):
        yield context.name, changed.config


def planned_jobs(first: ModelConfig, run: ReduceConfig, dtype: Any) -> Iterator[tuple[str, Job]]:
    """Yield the name and job of each stage that trains, on abstract leaves of this dtype.

    run.execution: resolved.
    """
    for context, model, _ in _planned(first, run, dtype):
        job = stage_of(run.stages[context.name]).job(model, context)
        if job is not None:
            yield context.name, job


def _planned(first: ModelConfig, run: ReduceConfig, dtype: Any) -> Iterator[tuple[StageContext, Model, Model]]:
    """Yield the context of each stage with the abstract model that it gets and the one that it makes."""
    first_model = model = abstract_model(first, dtype, manifest.read_chain(Path(run.model)))
    for name, entry in run.stages.items():
        context = StageContext(run, name, first, lambda: first_model, abstract_teacher)
        try:
            result = stage_of(entry).after(model, context)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None
        changed = _with_step(result, entry, model)
        yield context, model, changed
        model = changed


def _with_step(result: Result, entry: StageConfig, given: Model) -> Model:
    """Return the stage's result with the step that a run would append to its chain. given: the model it began with."""
    counts = parameter_count(given.config), parameter_count(result.model.config)
    step = Step("reduce", dataclasses.asdict(entry), (), *counts, kept_experts=result.kept_experts)
    return dataclasses.replace(result.model, chain=(*result.model.chain, step))
