"""Quality retained relative to a baseline, with bootstrap intervals over the same sequences or questions."""

from collections.abc import Callable
from typing import Any

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles: a 95 % interval


def retained(
    model_S: np.ndarray, baseline_S: np.ndarray, weights_S: np.ndarray | None = None
) -> dict[str, float | None]:
    """Compare two models on S questions: {model, baseline, retained, low, high}.

    model, baseline: weighted means. retained: their ratio, with its interval from a paired bootstrap; None for a
    baseline of 0. weights_S: such as tokens of each sequence; 1 if None.
    """
    weights_S = np.ones(len(model_S)) if weights_S is None else weights_S
    return _compared(model_S, baseline_S, weights_S, lambda model, base: model / base if base else float("nan"))


def lost(model_S: np.ndarray, baseline_S: np.ndarray, weights_S: np.ndarray) -> dict[str, Any]:
    """Compare losses like `retained`, with the difference of the means instead of their ratio."""
    found = _compared(model_S, baseline_S, weights_S, lambda model, base: model - base)
    return {("difference" if name == "retained" else name): value for name, value in found.items()}


def _compared(
    model_S: np.ndarray, baseline_S: np.ndarray, weights_S: np.ndarray, relation: Callable[[float, float], float]
) -> dict[str, float | None]:
    arrays = [np.asarray(values, np.float64) for values in (model_S, baseline_S, weights_S)]
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        chosen = generator.integers(0, len(arrays[0]), len(arrays[0]))
        model, base, weight = (float(values[chosen].sum()) for values in arrays)
        draws.append(relation(model / weight, base / weight) if weight else float("nan"))
    model, base, weight = (float(values.sum()) for values in arrays)
    low, high = np.nanpercentile(draws, INTERVAL) if not np.all(np.isnan(draws)) else (float("nan"),) * 2
    means = {"model": model / weight, "baseline": base / weight}
    compared = {"retained": relation(*means.values()), "low": float(low), "high": float(high)}
    return means | {name: None if np.isnan(value) else value for name, value in compared.items()}
