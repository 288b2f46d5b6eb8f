"""The stage that scores the experts on training text and keeps the best."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from moe_reduce.core.config import ModelConfig, PruneStage
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import home_layers, originals
from moe_reduce.data.batches import train_batches
from moe_reduce.models.model import Model
from moe_reduce.reduction import scores, selection
from moe_reduce.reduction.prune import prune
from moe_reduce.reduction.selection import KeptExperts
from moe_reduce.reduction.transform import expert_count, expert_rows, moe_of
from moe_reduce.runs.stages.stage import Originals, Result, RunContext, Stage, StageContext
from moe_reduce.runs.stages.text import text_seed
from moe_reduce.training import sharding


@dataclass(frozen=True)
class Prune(Stage):
    """Keep the best experts, equally many in each layer of a per-layer model."""

    config: PruneStage

    def after(self, model: Model, context: StageContext) -> Result:
        """Keep the first experts, as many as `run` keeps: the best are known only from scores."""
        moe_of(model.config)
        scores.check_criteria([self.config.criterion])
        kept = (tuple(range(self._keep(model.config, context))),) * expert_rows(model.config)
        return Result(prune(model, kept), _kept_originals(model, kept))

    def run(self, model: Model, context: RunContext) -> Result:
        """Score the experts, write scores.json and keep the best."""
        stage = self.config
        seed = text_seed(context, stage.seed)
        sums = scores.collect(model, _calibration(stage, context, seed), context.mesh)
        criteria = dict.fromkeys((stage.criterion, "frequency", "max_activation"))
        found = scores.scores(moe_of(model.config), sums, criteria, seed)
        if jax.process_index() == 0:
            scores.write(found, context.directory / "scores.json")
        protected: frozenset = frozenset()
        if stage.protect_super_experts:
            home_layer_NE = home_layers(model.config, model.chain)
            protected = selection.super_experts(found.of("max_activation"), home_layer_NE, model.config.layers)
        kept = selection.keep_by_row(found.of(stage.criterion), self._keep(model.config, context), protected)
        figures = {"tokens": 0, "calibration_tokens": sums.tokens}
        return Result(prune(model, kept), _kept_originals(model, kept), figures)

    def _keep(self, config: ModelConfig, context: StageContext) -> int:
        """Number of experts to keep in each row; `keep` refers to all experts of the first model."""
        moe, rows, total = moe_of(config), expert_rows(config), expert_count(context.first)
        keep = -(-selection.count_of(self.config.keep, total, "keep") // rows)
        if not moe.active <= keep <= moe.experts:
            where = "the pool" if rows == 1 else f"each of {rows} layers"
            raise UserError(
                f"keep={self.config.keep:g} asks for {keep} of the {moe.experts} experts in {where}, which cannot be "
                f"kept where {moe.active} are active for a token: of the first model's {total} experts keep a share, "
                f"such as 0.5, or from {rows * moe.active} to {rows * moe.experts}"
            )
        return keep


def _calibration(stage: PruneStage, context: RunContext, seed: int) -> Iterator[Any]:
    run = context.run
    shard = sharding.process_shard(context.mesh)
    batches = train_batches(context.tokens, run.data, run.train.batch_size, seed, *shard)
    return (sharding.put_batch(context.mesh, batch) for batch in itertools.islice(batches, stage.calibration_batches))


def _kept_originals(model: Model, kept: KeptExperts) -> Originals:
    before = originals(model.config, model.chain)
    return [[before[row][index] for index in indices] for row, indices in enumerate(kept)]
