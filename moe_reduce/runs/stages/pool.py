"""The stage that moves all experts into one pool."""

from dataclasses import dataclass

from moe_reduce.core.provenance import originals
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.model import Model
from moe_reduce.reduction.pool import pool
from moe_reduce.reduction.transform import moe_of
from moe_reduce.runs.stages.stage import Result, RunContext, Stage, StageContext


@dataclass(frozen=True)
class Pool(Stage):
    """Move the experts of all layers into one pool, in canonical form if the configuration says so."""

    config: PoolStage

    def after(self, model: Model, context: StageContext) -> Result:
        """Pool the experts; a random start takes its router from train.seed."""
        return pool_experts(self.config, model, context.run.train.seed)

    def run(self, model: Model, context: RunContext) -> Result:
        """Do what `after` does, on arrays."""
        return self.after(model, context)


def pool_experts(config: PoolStage, model: Model, seed: int) -> Result:
    """Pool the experts of a model. seed: for a random start. Raises UserError when the model cannot be pooled."""
    moe_of(model.config)
    home = [pair for row in originals(model.config, model.chain) for pair in row]
    return Result(pool(model, config, seed), [home])
