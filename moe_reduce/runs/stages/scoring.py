"""Scores of experts on a stage's text, and the number of experts that a stage leaves."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import originals
from moe_reduce.data.batches import train_batches
from moe_reduce.data.rows import every_token
from moe_reduce.models.model import Model
from moe_reduce.reduction import scores, selection
from moe_reduce.reduction.selection import KeptExperts
from moe_reduce.reduction.transform import expert_count, expert_rows, moe_of
from moe_reduce.runs.stages.stage import Originals, RunContext
from moe_reduce.runs.stages.text import text_seed
from moe_reduce.training import sharding

ALWAYS_SCORED = ("frequency", "max_activation")  # criteria written beside the one that a stage asks for


def score_experts(model: Model, criterion: str, batches: int, seed: int, context: RunContext) -> scores.Scores:
    """Score the experts on training text and write scores.json into the stage's directory.

    batches: number of batches read. seed: added to train.seed; decides the batches and the random criterion.
    """
    seed = text_seed(context, seed)
    sums = scores.collect(model, calibration(batches, seed, context), context.mesh)
    found = scores.scores(moe_of(model.config), sums, dict.fromkeys((criterion, *ALWAYS_SCORED)), seed)
    if jax.process_index() == 0:
        scores.write(found, context.directory / "scores.json")
    return found


def calibration(batches: int, seed: int, context: RunContext) -> Iterator[Any]:
    """Yield the first batches of the stage's text on the mesh, in which every token counts, with a target or not."""
    run, shard = context.run, sharding.process_shard(context.mesh)
    text = train_batches(every_token(context.tokens), run.data, run.train.batch_size, seed, *shard)
    return (sharding.put_batch(context.mesh, batch) for batch in itertools.islice(text, batches))


def experts_per_row(keep: float, config: ModelConfig, first: ModelConfig) -> int:
    """Number of experts that a stage leaves in each layer of a model, or in its pool.

    keep: share of all experts of the first model, or their number; divided evenly over the layers and rounded up.
    Raises UserError when the model has fewer experts, or more are active for a token.
    """
    moe, rows, total = moe_of(config), expert_rows(config), expert_count(first)
    count = -(-selection.count_of(keep, total, "keep") // rows)
    if not moe.active <= count <= moe.experts:
        where = "the pool" if rows == 1 else f"each of {rows} layers"
        raise UserError(
            f"keep={keep:g} asks for {count} of the {moe.experts} experts in {where}, which cannot be kept where "
            f"{moe.active} are active for a token: of the first model's {total} experts keep a share, such as 0.5, or "
            f"from {rows * moe.active} to {rows * moe.experts}"
        )
    return count


def kept_originals(model: Model, kept: KeptExperts) -> Originals:
    """Original (layer, index) of the experts kept, by row and in their new order."""
    before = originals(model.config, model.chain)
    return [[before[row][index] for index in indices] for row, indices in enumerate(kept)]
