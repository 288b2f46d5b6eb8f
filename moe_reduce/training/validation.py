"""Means of a task's validation metrics, each over a denominator of its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Mean(NamedTuple):
    """A mean that is still to be divided, so that batches can be added: sum of the values and sum of their weights."""

    total: Any  # scalar
    weight: Any  # scalar; below 1 it counts as 1, so that no metric divides by zero


def added(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add what `Task.evaluate` returned for several batches, on the host. batches: at least one."""
    return jax.tree.map(lambda *leaves: np.sum(np.stack(leaves), axis=0), *map(dict, batches))


def summarize(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Turn added sums into metrics: floats for means and other scalars, arrays as they are.

    Every `Mean` is divided by its own weight; perplexity is derived from the mean `loss`, in nats per token.
    """
    metrics = {name: _metric(value) for name, value in sums.items()}
    loss = metrics["loss"]
    # a loss that overflows exp is as good as infinite
    perplexity = math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf
    return {"loss": loss, "perplexity": perplexity} | metrics


def _metric(value: Any) -> Any:
    if isinstance(value, Mean):
        return float(value.total) / max(float(value.weight), 1.0)
    return value if np.ndim(value) else float(value)
