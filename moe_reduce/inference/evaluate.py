"""Loss, perplexity and next-token accuracy of a model on any corpus."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moe_reduce.config import DataConfig
from moe_reduce.data.batches import WholeSplit
from moe_reduce.data.prepare import prepare
from moe_reduce.models.decoder import Decoder
from moe_reduce.storage.model import Model
from moe_reduce.training.loop import summarize
from moe_reduce.training.losses import evaluator
from moe_reduce.training.sharding import compiled


def evaluate(model: Model, data: DataConfig, batch_size: int, max_batches: int | None) -> dict[str, Any]:
    """{loss (nats a token), perplexity, accuracy, tokens} over the whole corpus, or its first `max_batches` batches."""
    tokens, _ = prepare(data, model.config.vocab_size)
    batches = WholeSplit(tokens, data, batch_size)
    total_batches = len(batches) if max_batches is None else min(max_batches, len(batches))
    bar = tqdm(_first(batches, total_batches), total=total_batches, unit="batch", disable=not sys.stderr.isatty())
    result = measure(model, bar)
    return {name: result[name] for name in ("loss", "perplexity", "accuracy", "tokens")}


def measure(model: Model, batches: Iterable[Any], mesh: Mesh | None = None) -> dict[str, Any]:
    """{loss, perplexity, accuracy, tokens; with experts counts_NE} over batches, on a mesh if one is given."""
    step = compiled(evaluator(Decoder(model.config, model.execution)), mesh)
    sums = [jax.device_get(step(model.params, batch)) for batch in batches]
    total = jax.tree.map(lambda *leaves: np.sum(np.stack(leaves), axis=0), *sums)
    return summarize(total) | {"tokens": int(total["weight"])}


def _first(batches: WholeSplit, count: int) -> Iterator[Any]:
    return (batches[index] for index in range(count))
