"""Metrics that several tables and pictures derive from the summaries of runs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Summary = dict[str, Any]  # the content of a run's summary.json


def is_baseline(name: str, summary: Summary) -> bool:
    """True for a run that others are compared with: a dense model, or full fine-tuning of a base model."""
    return name == "dense" or ("method" in summary and summary["method"] == "full")


def baseline(summaries: Sequence[Summary]) -> Summary:
    """The run that the others are compared with; the first one if `is_baseline` is True for none."""
    return next((summary for summary in summaries if is_baseline(summary["name"], summary)), summaries[0])


def entropy(shares: Any) -> float:
    """Entropy of a distribution divided by that of the uniform one: 1 when even, 0 when one entry takes all."""
    shares = np.asarray(shares, np.float64)
    used = shares[shares > 0]
    return float(-np.sum(used * np.log(used)) / math.log(len(shares))) if len(shares) > 1 else 1.0


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean of the values in a format, with half of their range where there are several; "" where there are none."""
    if not values:
        return ""
    mean = f"{np.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form.lstrip('+')}}"
