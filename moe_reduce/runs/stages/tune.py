"""The stage that trains some components, with or without an adapter that is merged at the end."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging
from moe_reduce.adapters.checks import check_split
from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig, TuneStage
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, home_layers
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path
from moe_reduce.reduction.canonical import canonical
from moe_reduce.reduction.transform import expert_count, moe_of
from moe_reduce.runs.stages import recovery
from moe_reduce.runs.stages.stage import Result, RunContext, Stage, StageContext
from moe_reduce.runs.stages.text import text_seed
from moe_reduce.training import sharding
from moe_reduce.training.job import Job, fit
from moe_reduce.training.task import TEACHER


@dataclass(frozen=True)
class Tune(Stage):
    """Train some components of the model, which keeps its architecture."""

    config: TuneStage

    def after(self, model: Model, context: StageContext) -> Result:
        """Return the model with the adapter merged, if there is one; raises UserError if the stage cannot train it."""
        stage, moe = self.config, moe_of(model.config)
        recovery.check_components(stage, model.config)
        if stage.adapter is not None:
            check_split(stage.adapter, model.config, context.run.mesh.tensor)
            if "experts" in stage.components.split(",") and stage.objective == "language_model":
                raise UserError("components names experts, which train whole: leave the adapter out")
        if stage.bias_from is not None:
            if not (moe.placement == "shared" and moe.selection_bias):
                raise UserError("bias_from needs a pool, whose layers have a selection bias: put a pool stage before")
            foreign_experts(model.config, model.chain)
        pooled_here = moe.placement == "shared" and moe_of(context.first).placement == "layer"
        if stage.objective == "router" and not (pooled_here and moe.experts == expert_count(context.first)):
            raise UserError(
                "objective=router compares a whole pool with the routers it came from: put it before pruning"
            )
        return Result(model if stage.adapter is None else merging.merge(model, adapters.init(stage.adapter, model)))

    def job(self, model: Model, context: StageContext) -> Job:
        """Return the job: the model with the stage's adapter, bias and teacher."""
        stage, run, first = self.config, context.run, context.first
        if stage.adapter is not None:
            model = adapters.activate(model, adapters.init(stage.adapter, model))
        foreign_NE, others = None, {}
        if stage.bias_from is not None:
            foreign_NE = foreign_experts(model.config, model.chain)
            model = recovery.start_annealing(model, stage, foreign_NE)
        if stage.objective == "router" or stage.teacher_weight > 0:
            teacher = self._teacher(model, context)
            first, others = teacher.config, {TEACHER: teacher.params}
        task = recovery.recovery_task(Model(model.config, {}, run.execution), first, stage, run.balance, foreign_NE)
        schedule = dataclasses.replace(stage.schedule(run.train), seed=text_seed(context))
        return Job(task, model.config, model.params, run.execution, run.data, schedule, others)

    def run(self, model: Model, context: RunContext) -> Result:
        """Train, and merge the adapter if there is one."""
        job = self.job(model, context)
        trained, figures = fit(job, context.mesh, context.tokens, context.directory)
        params = _as_stored(model.config, trained, job.initial)
        tuned = dataclasses.replace(model, params=params)
        if self.config.adapter is not None:
            whole = sharding.to_host(context.mesh, {ADAPTER: params[ADAPTER]})
            tuned = merging.merge(tuned, adapters.Adapter(self.config.adapter, whole[ADAPTER]))
        return Result(tuned, None, figures)

    def _teacher(self, model: Model, context: StageContext) -> Model:
        """Return the first model; for objective=router, in canonical form if the pool is, to read the same inputs."""
        teacher = context.load_first()
        steps = model.chain[len(teacher.chain) :]
        if self.config.objective == "router" and any(step.arguments.get("canonical") for step in steps):
            return canonical(teacher)
        return teacher


def _as_stored(config: ModelConfig, trained: Any, before: Any) -> dict[str, Any]:
    """Return trained leaves to the dtype that they had before, except those that are always stored in fp32."""
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(before).items()}
    records = by_path(config)

    def stored(path: str, leaf: Any) -> Any:
        stays = path in records and records[path].precision == "float32_stored"
        return leaf if stays else leaf.astype(dtypes[path])

    return trees.map_with_path(stored, trained)


def foreign_experts(config: ModelConfig, chain: tuple[Step, ...]) -> np.ndarray:
    """Return a mask of a pool's experts that came from another layer, bool [N, E].

    Raises UserError when the chain does not say which layer each expert came from.
    """
    home_1E = home_layers(config, chain)
    if home_1E is None:
        raise UserError(
            "the manifest of this pool does not say which layer each expert came from, which bias_from needs: "
            "leave it out, or pool the model anew"
        )
    return home_1E != np.arange(config.layers)[:, None]
