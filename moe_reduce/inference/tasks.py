"""Tasks of the EleutherAI harness (lm-eval), from the hub or local files, and comparison of two models on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.harness import Harness
from moe_reduce.inference.retained import retained
from moe_reduce.models.model import Model


@dataclass(frozen=True)
class Selection:
    """Tasks by name, a directory of local ones, shots in each prompt, and questions per task (None: all)."""

    names: tuple[str, ...]
    path: Path | None = None
    few_shot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Results:
    """Results by task and metric: `figures` over all questions, and `by_question` for metrics that have such values.

    A task that filters its generations in several ways has `metric,filter` in place of each metric.
    """

    figures: dict[str, dict[str, float]]
    by_question: dict[str, dict[str, np.ndarray]]


def evaluate(model: Model, tokenizer: Path, selection: Selection, batch_size: int, mesh: Mesh | None = None) -> Results:
    """Run tasks, on a mesh if one is given. UserError for a task that is unknown, or whose data cannot be read."""
    manager = TaskManager(include_path=str(selection.path) if selection.path else None)
    known = set(manager.all_tasks)
    for name in selection.names:
        if name not in known:
            raise UserError(
                f"--tasks={name} is unknown to lm-eval: see its list of tasks, or give --task-path=DIRECTORY"
            )
    names: Any = list(selection.names)
    harness = Harness(model, load_tokenizer(tokenizer), batch_size, mesh=mesh)
    try:
        result: Any = simple_evaluate(
            model=harness, tasks=names, task_manager=manager, num_fewshot=selection.few_shot, limit=selection.limit,
            log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # a data set that is not on this machine, without a network
        raise UserError(f"the data of --tasks cannot be read ({str(error).splitlines()[0]})") from error
    figures, by_question = {}, {}
    for name, metrics in result["results"].items():
        figures[name], by_question[name] = _task_results(metrics, result["samples"].get(name, []))
    return Results(figures, by_question)


def _task_results(metrics: dict[str, Any], samples: list[Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(figures, by_question) of a task. metrics: by `metric,filter`. samples: every question, once for each filter."""
    numbers = {tuple(key.split(",")): value for key, value in metrics.items() if _is_figure(key, value)}
    several = len({kind for _, kind in numbers}) > 1
    figures, by_question = {}, {}
    for (metric, kind), value in numbers.items():
        name = f"{metric},{kind}" if several else metric
        figures[name] = value
        values = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        if values and all(isinstance(one, (int, float)) for one in values):
            by_question[name] = np.array(values, float)
    return figures, by_question


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and "," in key and not key.split(",")[0].endswith("_stderr")


def compare(model: Results, baseline: Results) -> dict[str, Any]:
    """Quality retained, {task: {metric: `retained`}}, for metrics that have a value for each question."""
    return {
        name: {metric: retained(values, baseline.by_question[name][metric]) for metric, values in metrics.items()}
        for name, metrics in model.by_question.items()
    }
