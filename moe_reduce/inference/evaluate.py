"""Loss, perplexity and next-token accuracy of a model on any corpus."""

import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moe_reduce.core.config import DataConfig, ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.batches import WholeSplit
from moe_reduce.data.prepare import prepare
from moe_reduce.models.model import Model
from moe_reduce.training.losses import evaluator, token_losses
from moe_reduce.training.sharding import compiled
from moe_reduce.training.validation import Mean, added, summarize


class RowSums(NamedTuple):
    """Sums over the counted targets of each sequence of a corpus: fp32 arrays [sequences]."""

    nll: np.ndarray
    correct: np.ndarray
    weight: np.ndarray

    def figures(self) -> dict[str, Any]:
        """{loss (nats per token), perplexity, accuracy, tokens} over all sequences."""
        nll, correct, weight = (float(np.sum(values, dtype=np.float64)) for values in self)
        return summarize({"loss": Mean(nll, weight), "accuracy": Mean(correct, weight)}) | {"tokens": int(weight)}


def evaluate(
    model: Model, data: DataConfig, batch_size: int, max_batches: int | None, mesh: Mesh | None = None
) -> RowSums:
    """Evaluate a model on a whole corpus, or on its first `max_batches` batches, on a mesh if one is given.

    UserError if the losses are not finite.
    """
    tokens, _ = prepare(data, model.config.vocab_size)
    batches = WholeSplit(tokens, data, batch_size)
    total_batches = len(batches) if max_batches is None else min(max_batches, len(batches))
    bar = tqdm(_first(batches, total_batches), total=total_batches, unit="batch", disable=not sys.stderr.isatty())
    return row_sums(model, bar, mesh)


def row_sums(model: Model, batches: Iterable[Any], mesh: Mesh | None = None) -> RowSums:
    """Sums of every row of some batches (data/batches.py). UserError if the losses are not finite."""
    step = _step(model.config, model.execution, mesh)
    batch_sums = [jax.device_get(step(model.params, batch)) for batch in batches]
    sums = RowSums(*(np.concatenate(values) for values in zip(*batch_sums, strict=True)))
    if not np.all(np.isfinite(sums.nll)):
        raise UserError(
            f"losses of this model are not finite in {model.execution.compute_dtype}: its weights are damaged, or the "
            "computation overflows"
        )
    return sums


@cache
def _step(config: ModelConfig, execution: ExecutionConfig, mesh: Mesh | None) -> Any:
    """Evaluation step, compiled once for all models of one architecture."""
    return compiled(partial(_row_sums, Model(config, {}, execution)), mesh)


def _row_sums(skeleton: Model, params: Any, batch: Any) -> RowSums:
    logits_BTV, _ = skeleton.with_params(params).apply(batch)
    nll_BT, correct_BT = token_losses(logits_BTV, batch)
    sums: Any = (jnp.sum(values * batch["weights"], axis=1) for values in (nll_BT, correct_BT, 1.0))
    return RowSums(*sums)


def measure(model: Model, batches: Iterable[Any], mesh: Mesh | None = None) -> dict[str, Any]:
    """Measure {loss, perplexity, accuracy, tokens} over batches, and counts_NE for a mixture of experts.

    counts_NE: assignments by layer and expert. mesh: runs on it, if given.
    """
    step = compiled(evaluator(model.with_params({})), mesh)
    sums = added([jax.device_get(step(model.params, batch)) for batch in batches])
    return summarize(sums) | {"tokens": int(sums["loss"].weight)}


def _first(batches: WholeSplit, count: int) -> Iterator[Any]:
    return (batches[index] for index in range(count))
