"""Values of each question of lm-eval's tasks on disk, so that models can be compared after they were measured."""

import json
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.registry import AGGREGATION_REGISTRY

from moe_reduce.core import disk
from moe_reduce.inference.tasks import Metric, Results


def write(results: Results, file: Path) -> None:
    """Write results as JSON: {task: {metric: {figure, values, aggregation, higher_is_better, questions}}}.

    aggregation: its name in lm-eval; null for a function of the task's own.
    """
    names = {aggregate: name for name, aggregate in AGGREGATION_REGISTRY.items()}
    content = {
        task: {name: metric._asdict() | {"aggregate": names.get(metric.aggregate)} for name, metric in metrics.items()}
        for task, metrics in results.items()
    }
    disk.write_text(file, json.dumps(content, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """An array or a number of NumPy as Python's own."""
    return value.tolist()


def read(file: Path) -> Results:
    """Results as `write` wrote them. The values of a metric with a function of its own are left out."""
    return {
        task: {name: _metric(stored) for name, stored in metrics.items()}
        for task, metrics in disk.read_json(file).items()
    }


def _metric(stored: dict[str, Any]) -> Metric:
    name = stored.pop("aggregate")
    if name is None:
        return Metric(**stored | {"values": (), "aggregate": mean})
    return Metric(**stored, aggregate=AGGREGATION_REGISTRY[name])
