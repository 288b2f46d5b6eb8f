"""The stage that trains some components: an adapter that is merged at the end, or matrices rounded as they train."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging
from moe_reduce.adapters.checks import check_split
from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import Scheme
from moe_reduce.core.stages import TuneStage
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path
from moe_reduce.models.weights import cast, is_quantised
from moe_reduce.quantization import fake
from moe_reduce.reduction.transform import moe_of
from moe_reduce.runs import teaching
from moe_reduce.runs.stages import annealing, recovery
from moe_reduce.runs.stages.objectives import objective_of
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
        stage = self.config
        moe_of(model.config)
        recovery.check_components(stage, model.config)
        objective_of(stage).check(stage, model.config, context.first)
        if stage.teacher is not None:
            teaching.check(stage.distillation(context.run.model), model.config, context.run.mesh, "teacher")
        if stage.adapter is not None:
            check_split(stage.adapter, model.config, context.run.mesh.tensor)
            if "experts" in stage.components.split(","):
                raise UserError("components names experts, which then train whole: leave the adapter out")
        if stage.bias_from is not None:
            annealing.check_pool(model.config)
            annealing.foreign_experts(model.config, model.chain)
        if stage.adapter is not None:
            return Result(merging.merge(model, adapters.init(stage.adapter, model)))
        schemes = self._schemes(model)
        return Result(model.with_params(fake.quantised(model.params, model.config, schemes)))

    def _schemes(self, model: Model) -> dict[str, Scheme]:
        """Return the scheme by path of each matrix that is rounded; raises UserError if one is quantised already."""
        schemes, flat = fake.parse(self.config.qat, model.config, "qat"), trees.flatten(model.params)
        if any(is_quantised(flat[path]) for path in schemes):
            raise UserError("qat trains matrices that are not quantised: put the stage before `quantize`")
        return schemes

    def job(self, model: Model, context: StageContext) -> Job:
        """Return the job: the model with the stage's adapter, bias and teacher."""
        stage, run = self.config, context.run
        if stage.adapter is not None:
            model = adapters.activate(model, adapters.init(stage.adapter, model))
        foreign_NE = None
        if stage.bias_from is not None:
            foreign_NE = annealing.foreign_experts(model.config, model.chain)
            model = annealing.start_annealing(model, stage, foreign_NE)
        teacher = objective_of(stage).teacher(stage, model, context)
        frozen = {} if teacher is None else {TEACHER: teacher.params}
        teacher_config = context.first if teacher is None else teacher.config
        student = Model(model.config, {}, run.execution)
        task = recovery.recovery_task(student, teacher_config, stage, run.balance, foreign_NE)
        task = fake.quantisation_aware(task, model.config, self._schemes(model))
        schedule = dataclasses.replace(stage.schedule(run.train), seed=text_seed(context))
        stored = stage.teacher_logits is not None
        return Job(task, model.config, model.params, run.execution, run.data, schedule, frozen, stored)

    def run(self, model: Model, context: RunContext) -> Result:
        """Train, and merge the adapter if there is one."""
        job, tokens = self.job(model, context), context.tokens
        if job.stored_teacher:
            text = teaching.Text(tokens, job.data, job.train.batch_size)
            tokens = teaching.stored(self.config.distillation(context.run.model), text, job.execution, context.mesh)
        trained, figures = fit(job, context.mesh, tokens, context.directory)
        rounded = fake.quantised(trained, model.config, self._schemes(model))
        params = _as_stored(model.config, rounded, job.initial)
        tuned = dataclasses.replace(model, params=params)
        if self.config.adapter is not None:
            whole = sharding.to_host(context.mesh, {ADAPTER: params[ADAPTER]})
            tuned = merging.merge(tuned, adapters.Adapter(self.config.adapter, whole[ADAPTER]))
        return Result(tuned, None, figures)


def _as_stored(config: ModelConfig, trained: Any, initial: Any) -> dict[str, Any]:
    """Cast trained leaves to the dtype that they had at first, except those that are always stored in fp32."""
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(initial).items()}
    records = by_path(config)

    def stored(path: str, leaf: Any) -> Any:
        stays = path in records and records[path].precision == "float32_stored"
        return leaf if stays else cast(leaf, dtypes[path])

    return trees.map_with_path(stored, trained)
