"""The stage that scores the experts on training text and keeps the best."""

from dataclasses import dataclass

from moe_reduce.core.provenance import home_layers
from moe_reduce.core.stages import PruneStage
from moe_reduce.models.model import Model
from moe_reduce.reduction import scores, selection
from moe_reduce.reduction.prune import prune
from moe_reduce.reduction.transform import expert_rows, moe_of
from moe_reduce.runs.stages.scoring import experts_per_row, kept_originals, score_experts
from moe_reduce.runs.stages.stage import Result, RunContext, Stage, StageContext


@dataclass(frozen=True)
class Prune(Stage):
    """Keep the best experts, equally many in each layer of a per-layer model."""

    config: PruneStage

    def after(self, model: Model, context: StageContext) -> Result:
        """Keep the first experts, as many as `run` keeps: which ones are best is known only from scores."""
        keep = experts_per_row(self.config.keep, model.config, context.first)
        scores.check_criteria([self.config.criterion])
        kept = (tuple(range(keep)),) * expert_rows(model.config)
        return Result(prune(model, kept), kept_originals(model, kept))

    def run(self, model: Model, context: RunContext) -> Result:
        """Score the experts, write scores.json and keep the best."""
        stage = self.config
        found = score_experts(model, stage.criterion, stage.calibration_batches, stage.seed, context)
        protected: frozenset = frozenset()
        if stage.protect_super_experts:
            home_layer_NE = home_layers(model.config, model.chain)
            protected = selection.super_experts(found.of("max_activation"), home_layer_NE, model.config.expert_layers)
        keep = experts_per_row(stage.keep, model.config, context.first)
        kept = selection.keep_by_row(found.of(stage.criterion), keep, protected, moe_of(model.config).groups)
        figures = {"tokens": 0, "calibration_tokens": found.tokens}
        return Result(prune(model, kept), kept_originals(model, kept), figures)
