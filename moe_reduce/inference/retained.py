"""Intervals of figures, and quality retained relative to a baseline, bootstrapped over the same questions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles: a 95 % interval
WIDTH = 1.959964  # of that interval, in standard errors of a normal distribution

# (question indices) -> figures of the model and of the baseline
Figures = Callable[[np.ndarray], tuple[float, float]]
Aggregate = Callable[[list[Any]], float]
Relation = Callable[[float, float], float]


def interval(values: Sequence[Any], aggregate: Aggregate) -> tuple[float, float]:
    """95 % interval of the figure that `aggregate` makes of the values of a sample of questions.

    For a share of right answers, values of 0 and 1, it is Wilson's interval (doi:10.1080/01621459.1927.10502953), which
    stays wide where all or none are right; for other figures it is bootstrapped.
    """
    count = len(values)
    if all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values):
        share_right, spread = aggregate(list(values)), WIDTH**2 / count
        middle = share_right + spread / 2
        half = np.sqrt(spread * (share_right * (1 - share_right) + spread / 4))
        return float((middle - half) / (1 + spread)), float((middle + half) / (1 + spread))
    generator = np.random.default_rng(0)
    drawn = [aggregate([values[index] for index in generator.integers(0, count, count)]) for _ in range(DRAWS)]
    low, high = np.nanpercentile(drawn, INTERVAL)
    return float(low), float(high)


def retained(
    model_S: np.ndarray, baseline_S: np.ndarray, weights_S: np.ndarray | None = None
) -> dict[str, float | None]:
    """Compare two models on S questions: {model, baseline, retained, low, high}.

    model, baseline: weighted means. retained: their ratio, with its interval from a paired bootstrap; None for a
    baseline of 0. weights_S: such as tokens of each sequence; 1 if None.
    """
    weights_S = np.ones(len(model_S)) if weights_S is None else weights_S
    return _compared(len(model_S), _means(model_S, baseline_S, weights_S), _ratio)


def lost(model_S: np.ndarray, baseline_S: np.ndarray, weights_S: np.ndarray) -> dict[str, Any]:
    """Compare losses like `retained`, with the difference of the means instead of their ratio."""
    found = _compared(len(model_S), _means(model_S, baseline_S, weights_S), lambda model, base: model - base)
    return {("difference" if name == "retained" else name): value for name, value in found.items()}


def retained_metric(
    model: Sequence[Any], baseline: Sequence[Any], aggregate: Aggregate | None, higher: bool | None, draws: int = DRAWS
) -> dict[str, Any]:
    """Compare two models by any metric: {model, baseline, retained, low, high, retained_is, higher_is_better}.

    model, baseline: values of the same questions. aggregate: makes a figure of a list of values; None for their mean.
    higher: whether higher is better; None if unknown. retained: the ratio of the figures that is below 1 for a worse
    model, which `retained_is` names; None where there is no such ratio.
    """
    if aggregate is None:
        figures = _means(np.asarray(model), np.asarray(baseline), np.ones(len(model)))
    else:
        figures = _aggregated(model, baseline, aggregate)
    name, relation = share(*figures(np.arange(len(model))), higher)
    return _compared(len(model), figures, relation, draws) | {"retained_is": name, "higher_is_better": higher}


def retained_figure(model: float, baseline: float, higher: bool | None) -> dict[str, Any]:
    """Compare two figures like `retained_metric`, without an interval, where the values behind them are unknown."""
    name, relation = share(model, baseline, higher)
    kept = _number(relation(model, baseline))
    found = {"model": model, "baseline": baseline, "retained": kept, "low": None, "high": None}
    return found | {"retained_is": name, "higher_is_better": higher}


def share(model: float, baseline: float, higher: bool | None) -> tuple[str, Relation]:
    """(name, relation) of the ratio of two figures that is below 1 for a worse model.

    For figures such as perplexities, of which lower is better, it is the baseline by the model. For negative ones, such
    as mean log-likelihoods, it is inverted again.
    """
    if higher is None:
        return "undefined: the task does not say whether higher is better", _undefined
    if not (np.isfinite(model) and np.isfinite(baseline)) or model * baseline < 0:
        return "undefined: the figures differ in sign, or are not finite", _undefined
    negative = min(model, baseline) < 0
    if higher != negative:
        return "model / baseline", _ratio
    return "baseline / model", lambda model, base: _ratio(base, model)


def _undefined(_model: float, _baseline: float) -> float:
    return float("nan")


def _ratio(above: float, below: float) -> float:
    """NaN for figures of different signs, and for a division by 0."""
    return above / below if below and above * below >= 0 else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _means(model_S: np.ndarray, baseline_S: np.ndarray, weights_S: np.ndarray) -> Figures:
    arrays = [np.asarray(values, np.float64) for values in (model_S, baseline_S, weights_S)]

    def figures(chosen: np.ndarray) -> tuple[float, float]:
        model, base, weight = (float(values[chosen].sum()) for values in arrays)
        return (model / weight, base / weight) if weight else (float("nan"), float("nan"))

    return figures


def _aggregated(model: Sequence[Any], baseline: Sequence[Any], aggregate: Aggregate) -> Figures:
    def figures(chosen: np.ndarray) -> tuple[float, float]:
        indices = chosen.tolist()
        ours, theirs = (aggregate([values[index] for index in indices]) for values in (model, baseline))
        return ours, theirs

    return figures


def _compared(count: int, figures: Figures, relation: Relation, draws: int = DRAWS) -> dict[str, float | None]:
    generator = np.random.default_rng(0)
    drawn = [relation(*figures(generator.integers(0, count, count))) for _ in range(draws)]
    low, high = np.nanpercentile(drawn, INTERVAL) if not np.all(np.isnan(drawn)) else (float("nan"),) * 2
    model, base = figures(np.arange(count))
    compared = {"retained": relation(model, base), "low": float(low), "high": float(high)}
    return {"model": model, "baseline": base} | {name: _number(value) for name, value in compared.items()}
