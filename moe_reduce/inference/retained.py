"""How much of one model's quality another keeps, with bootstrap intervals over the same sequences or questions."""

from typing import Any

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percent: what 95 of 100 draws lie between


def retained(ours_S: np.ndarray, theirs_S: np.ndarray, weights_S: np.ndarray | None = None) -> dict[str, Any]:
    """{model, baseline, retained, low, high}: means, their ratio, and its interval; S questions, drawn in pairs.

    weights_S: what both are divided by, such as tokens; 1 each without. Of a baseline of 0 nothing can be
    retained: None.
    """
    weights_S = np.ones(len(ours_S)) if weights_S is None else weights_S
    return _compared(ours_S, theirs_S, weights_S, lambda ours, theirs: ours / theirs if theirs else float("nan"))


def lost(ours_S: np.ndarray, theirs_S: np.ndarray, weights_S: np.ndarray) -> dict[str, Any]:
    """As `retained`, with the difference of the means in place of their ratio: for losses."""
    found = _compared(ours_S, theirs_S, weights_S, lambda ours, theirs: ours - theirs)
    return {("difference" if name == "retained" else name): value for name, value in found.items()}


def _compared(ours_S: np.ndarray, theirs_S: np.ndarray, weights_S: np.ndarray, relation: Any) -> dict[str, Any]:
    arrays = [np.asarray(values, np.float64) for values in (ours_S, theirs_S, weights_S)]
    draw = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        chosen = draw.integers(0, len(arrays[0]), len(arrays[0]))
        ours, theirs, weight = (float(values[chosen].sum()) for values in arrays)
        found.append(relation(ours / weight, theirs / weight) if weight else float("nan"))
    ours, theirs, weight = (float(values.sum()) for values in arrays)
    low, high = np.nanpercentile(found, INTERVAL) if not np.all(np.isnan(found)) else (float("nan"),) * 2
    means = {"model": ours / weight, "baseline": theirs / weight}
    share = {"retained": relation(*means.values()), "low": float(low), "high": float(high)}
    return means | {name: None if np.isnan(value) else value for name, value in share.items()}
