"""Tasks of the EleutherAI harness (lm-eval), from the hub or from local files; and two models beside each other."""

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
class Found:
    """figures: {task: {metric: value}}; answers: {task: {metric: its value for each question}}, where it has one.

    A task that reads what was generated through several filters has `metric,filter` in place of each metric.
    """

    figures: dict[str, dict[str, float]]
    answers: dict[str, dict[str, np.ndarray]]


def evaluate(
    model: Model,
    tokenizer: Path,
    names: list[str],
    batch_size: int,
    path: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> Found:
    """Runs the tasks, on a mesh if one is given.

    Raises UserError for a task that is unknown, or whose data cannot be read.
    """
    manager = TaskManager(include_path=str(path) if path else None)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks={name} is unknown to lm-eval: see its list of tasks, or give --task-path=DIRECTORY"
            )
    wanted: Any = names
    wrapped = Harness(model, load_tokenizer(tokenizer), batch_size, mesh=mesh)
    try:
        result: Any = simple_evaluate(
            model=wrapped, tasks=wanted, task_manager=manager, num_fewshot=few_shot, limit=limit, log_samples=True,
            bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # a data set that is not on this machine, and no hub
        raise UserError(f"the data of --tasks cannot be read ({str(error).splitlines()[0]})") from error
    figures, answers = {}, {}
    for name, metrics in result["results"].items():
        figures[name], answers[name] = _of_task(metrics, result["samples"].get(name, []))
    return Found(figures, answers)


def _of_task(metrics: dict[str, Any], samples: list[Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(figures, answers); metrics: by `metric,filter`. samples: every question, once for each filter."""
    numbers = {tuple(key.split(",")): value for key, value in metrics.items() if _is_figure(key, value)}
    several = len({kind for _, kind in numbers}) > 1
    figures, answers = {}, {}
    for (metric, kind), value in numbers.items():
        name = f"{metric},{kind}" if several else metric
        figures[name] = value
        mine = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        if mine and all(isinstance(answer, (int, float)) for answer in mine):
            answers[name] = np.array(mine, float)
    return figures, answers


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and "," in key and not key.split(",")[0].endswith("_stderr")


def beside(ours: Found, theirs: Found) -> dict[str, Any]:
    """{task: {metric: what is retained}} for metrics that have a value for each question."""
    return {
        name: {metric: retained(values, theirs.answers[name][metric]) for metric, values in metrics.items()}
        for name, metrics in ours.answers.items()
    }
