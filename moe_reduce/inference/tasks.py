"""Tasks of the EleutherAI harness (lm-eval), from the hub or local files, and comparison of two models on them."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from jax.sharding import Mesh
from lm_eval import evaluator
from lm_eval.api.metrics import mean
from lm_eval.tasks import TaskManager

from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.harness import Harness
from moe_reduce.inference.retained import DRAWS, interval, retained_figure, retained_metric
from moe_reduce.models.model import Model

SEEDS = {"random": 0, "numpy": 1234, "few_shot": 1234}  # those of lm-eval's own command
QUICK = ("mean", "nanmean", "median", "perplexity", "weighted_perplexity", "bits_per_byte")
SLOW_DRAWS = 200  # of a bootstrap with any other aggregation, such as BLEU


@dataclass(frozen=True)
class Selection:
    """Tasks by name, and how they are run.

    path: directory of local tasks. data: directory that these read, passed to them as the metadata `data`. few_shot:
    examples in each prompt. limit: questions of each task; None for all. allow_code: whether answers that are programs
    may be executed.
    """

    names: tuple[str, ...]
    path: Path | None = None
    data: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    allow_code: bool = False


class Metric(NamedTuple):
    """A figure over all questions of a task or a group of tasks.

    values: by question, None for one without a value; empty for a group. aggregate: makes the figure of the values.
    higher_is_better: None if the task does not say. questions: hash of the document and prompt of each value.
    """

    figure: float
    values: Sequence[Any]
    aggregate: Callable[..., float]
    higher_is_better: bool | None
    questions: Sequence[str] = ()


Results = dict[str, dict[str, Metric]]  # by task and metric; `metric,filter` for tasks that filter in several ways


def figures(results: Results) -> dict[str, dict[str, float]]:
    """The figures of each task by metric."""
    return {task: {name: metric.figure for name, metric in metrics.items()} for task, metrics in results.items()}


def evaluate(model: Model, tokenizer: Path, selection: Selection, batch_size: int, mesh: Mesh | None = None) -> Results:
    """Run tasks, on a mesh if one is given. UserError for a task that is unknown, or whose data cannot be read."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager = _manager(selection)
    known = set(manager.all_tasks)
    for name in selection.names:
        if name not in known:
            raise UserError(
                f"--tasks={name} is unknown to lm-eval: see its list of tasks, or give --task-path=DIRECTORY"
            )
    harness = Harness(model, load_tokenizer(tokenizer), batch_size, mesh=mesh)
    try:
        loaded: Any = _loaded(manager, selection)
        # simple_evaluate would also ask git and pip about this machine
        result: Any = evaluator.evaluate(
            harness, loaded, limit=selection.limit, log_samples=True, bootstrap_iters=0,
            confirm_run_unsafe_code=selection.allow_code,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # a data set that is not on this machine, without a network
        raise UserError(f"the data of --tasks cannot be read ({_line(error)})") from error
    found = {}
    for name, metrics in result["results"].items():
        task = loaded["tasks"].get(name)
        aggregations = {} if task is None else task.aggregation()
        higher = result["higher_is_better"].get(name) or {}
        found[name] = _metrics(metrics, result["samples"].get(name, []), aggregations, higher)
    return found


def _manager(selection: Selection) -> TaskManager:
    """The tasks that are known: the local ones alone if those are all that is wanted, else also lm-eval's own."""
    metadata: Any = {"data": str(selection.data)} if selection.data else None
    if selection.path is None:
        return TaskManager(metadata=metadata)
    path = str(selection.path)
    local = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
    if set(selection.names) <= set(local.all_subtasks):  # indexing the thousands of others takes seconds
        return local
    return TaskManager(include_path=path, metadata=metadata)


def _loaded(manager: TaskManager, selection: Selection) -> Any:
    """The tasks and groups, with seeds and shots as lm-eval's own command sets them."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])  # tasks may draw from the global generators
    try:
        loaded: Any = manager.load(list(selection.names))
    except ValueError as error:
        raise UserError(f"--tasks={','.join(selection.names)} cannot be loaded ({_line(error)})") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not selection.allow_code:
            raise UserError(f"--tasks={name} executes programs that the model writes: add --allow-code to let it")
        own = task.get_config("num_fewshot")
        if own is None or (selection.few_shot is not None and own != 0):  # a task's own 0 is never overridden
            task.set_config(key="num_fewshot", value=selection.few_shot or 0)
        task.set_fewshot_seed(seed=SEEDS["few_shot"])
    return loaded


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _metrics(
    numbers: dict[str, Any], samples: list[Any], aggregations: dict[str, Any], higher: dict[str, Any]
) -> dict[str, Metric]:
    """Metrics of a task. numbers: by `metric,filter`. samples: every question, once for each filter."""
    split = {tuple(key.split(",")): value for key, value in numbers.items() if _is_figure(key, value)}
    several = len({kind for _, kind in split}) > 1
    found = {}
    for (metric, kind), value in split.items():
        filtered = [sample for sample in samples if sample["filter"] == kind]
        values = [sample.get(metric) for sample in filtered]
        questions = [f"{sample['doc_hash'][:16]}{sample['prompt_hash'][:16]}" for sample in filtered]
        aggregate = aggregations.get(metric, mean)
        name = f"{metric},{kind}" if several else metric
        found[name] = Metric(value, values, aggregate, higher.get(metric), questions)
    return found


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and "," in key and not key.split(",")[0].endswith("_stderr")


def intervals(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """95 % interval of each figure, {task: {metric: {low, high}}}; none for groups and for slow aggregations."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, metrics in results.items():
        for name, metric in metrics.items():
            values = [value for value in metric.values if value is not None]
            if values and _is_quick(metric):
                low, high = interval(values, metric.aggregate)
                found.setdefault(task, {})[name] = {"low": low, "high": high}
    return found


def _is_quick(metric: Metric) -> bool:
    return getattr(metric.aggregate, "__name__", "") in QUICK


def compare(model: Results, baseline: Results) -> dict[str, Any]:
    """Quality retained, {task: {metric: …}}, as `retained_metric` gives it; a group of tasks has no interval.

    UserError if a task's questions are not those of the baseline.
    """
    for task, metrics in model.items():
        if any(metric.questions != baseline[task][name].questions for name, metric in metrics.items()):
            raise UserError(
                f"the baseline answered other questions of {task}: measure it with the same data, limit and examples"
            )
    return {
        task: {name: _compared(metric, baseline[task][name]) for name, metric in metrics.items()}
        for task, metrics in model.items()
    }


def _compared(model: Metric, baseline: Metric) -> dict[str, Any]:
    both = zip(model.values, baseline.values, strict=True)
    pairs = [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]
    if not pairs:
        return retained_figure(model.figure, baseline.figure, model.higher_is_better)
    ours, theirs = zip(*pairs, strict=True)
    is_mean = model.aggregate is mean and all(isinstance(value, (int, float)) for value in (*ours, *theirs))
    draws = DRAWS if _is_quick(model) else SLOW_DRAWS
    return retained_metric(ours, theirs, None if is_mean else model.aggregate, model.higher_is_better, draws)
