"""Score a model on benchmarks of lm-eval, by domain, with 95 % intervals. Run it by benchmarks.sh."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.__main__ import main as run
from moe_reduce.core import disk
from moe_reduce.core.errors import UserError
from moe_reduce.inference import task_files, tasks
from moe_reduce.inference.retained import DRAWS, INTERVAL
from moe_reduce.reports import tables
from moe_reduce.storage import manifest

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "launch/benchmarks"
SETTINGS, SUMMARY, QUESTIONS = "settings.json", "summary.json", "questions.json"
COLUMNS = ["domain", "benchmark", "metric", "questions", "score", "95% interval"]
BESIDE = ["baseline", "kept", "95% interval of kept"]
MEAN = "mean"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of a domain.

    task: its name in lm-eval. metrics: those shown; the first is a share of right answers, and counts in the domain's
    mean. executes: whether answers are programs, which are run.
    """

    domain: str
    name: str
    task: str
    metrics: tuple[str, ...]
    executes: bool = False


EXACT = "exact_match,flexible-extract"
BENCHMARKS = (
    Benchmark("multiple choice", "ARC easy", "arc_easy", ("acc_norm",)),
    Benchmark("multiple choice", "ARC challenge", "arc_challenge", ("acc_norm",)),
    Benchmark("multiple choice", "BoolQ", "boolq", ("acc",)),
    Benchmark("mathematics", "GSM8K", "gsm8k", (EXACT,)),
    Benchmark("mathematics", "SVAMP", "svamp", (EXACT,)),
    Benchmark("code", "HumanEval", "humaneval", ("pass_at_1",), executes=True),
    Benchmark("code", "MBPP", "mbpp", ("pass_at_1",), executes=True),
    Benchmark("text", "LAMBADA", "lambada_openai", ("acc", "perplexity")),
)
COPIED = {"boolq": Benchmark("multiple choice", "BoolQ without passages", "boolq_without_passage", ("acc",))}
ALL = ",".join(one.task for one in BENCHMARKS)


def main() -> int:
    """Prints the table and the path of its summary.json; returns 2 after a line that says what is wrong."""
    given = _arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of tasks that read local files
    try:
        chosen = _chosen(given)
        ours = measured(given, chosen, given.model, given.adapter, given.out)
        theirs = None
        if given.baseline is not None:
            is_result = (given.baseline / SETTINGS).is_file()
            place = given.baseline if is_result else given.out / "baseline"
            theirs = stored(place) if is_result else measured(given, chosen, given.baseline, None, place)
        result = _result(given, table(chosen, ours, theirs), ours)
    except UserError as error:
        print(f"benchmarks.sh: {error}", file=sys.stderr)
        return error.status
    print(tables.aligned([result["columns"], *result["rows"]]))
    disk.write_json(given.out / SUMMARY, result)
    print(given.out / SUMMARY)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file")
    parser.add_argument("--data", type=Path, help="directory of copies of the questions (default: from the hub)")
    parser.add_argument("--baseline", type=Path, help="a result of this script, or a model: show the share kept of it")
    parser.add_argument("--adapter", type=Path, help="adapter directory to run beside the model, not beside a baseline")
    parser.add_argument("--limit", type=int, help="most questions of each benchmark (default: all)")
    parser.add_argument(
        "--allow-code", action="store_true", help="run HumanEval and MBPP, which execute what is written"
    )
    parser.add_argument("--tasks", default=ALL, help="some of the benchmarks, comma separated (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="requests in a batch (default: %(default)s)")
    parser.add_argument("--compute-dtype", default="float32", help="of matrix products (default: %(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="devices to split each matrix over (default: 1)")
    parser.add_argument("--out", type=Path, help="directory to write (default: runs/benchmarks/NAME of the model)")
    given = parser.parse_args()
    given.out = given.out or Path("runs/benchmarks") / _name(given.model)
    return given


def _name(model: Path) -> str:
    return model.resolve().name.removesuffix(".gguf")


def _chosen(given: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks asked for, as copies have them, but for those that execute programs unless that is allowed."""
    names = given.tasks.split(",")
    known = {one.task: one for one in BENCHMARKS}
    for name in names:
        if name not in known:
            raise UserError(f"--tasks={name} is not one of {', '.join(known)}: choose among them")
    found = [one for one in BENCHMARKS if one.task in names]
    left_out = [one.task for one in found if one.executes and not given.allow_code]
    if left_out:
        print(f"left out, because they execute what the model writes: {', '.join(left_out)} (--allow-code)")
    kept = [one for one in found if one.task not in left_out]
    return [COPIED.get(one.task, one) for one in kept] if given.data else kept


def measured(
    given: argparse.Namespace, chosen: list[Benchmark], model: Path, adapter: Path | None, out: Path
) -> tasks.Results:
    """Results of a model by task, measuring those that `out` does not have yet."""
    _check_settings(given, model, adapter, out)
    for one in chosen:
        name = one.task
        if (out / name / SUMMARY).is_file():
            print(f"{name}: finished earlier", file=sys.stderr)
            continue
        print(f"{name} …", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            status = run(["evaluate", *_evaluate_arguments(given, name, model, adapter), f"--out={out / name}"])
        if status:
            raise UserError(f"{name} was not measured: see the line above")
    return {name: metrics for one in chosen for name, metrics in _stored_task(out, one.task).items()}


def _evaluate_arguments(given: argparse.Namespace, name: str, model: Path, adapter: Path | None) -> Iterator[str]:
    yield from (f"--model={model}", f"--tasks={name}", f"--batch-size={given.batch_size}", f"--tensor={given.tensor}")
    yield from (f"--task-path={TASKS}", f"--compute-dtype={given.compute_dtype}")
    for option, value in (("task-data", given.data), ("adapter", adapter), ("limit", given.limit)):
        if value is not None:
            yield f"--{option}={value}"
    if given.allow_code:
        yield "--allow-code"


def _check_settings(given: argparse.Namespace, model: Path, adapter: Path | None, out: Path) -> None:
    """Write what the results in `out` depend on; UserError if they were measured otherwise."""
    for place in (model, given.data, adapter):
        if place is not None and not place.exists():
            raise UserError(f"{place} does not exist: give a path on this machine")
    wanted = {
        "model": manifest.input_of(model).sha256, "adapter": adapter and manifest.input_of(adapter).sha256,
        "data": given.data and str(given.data.resolve()), "limit": given.limit, "compute_dtype": given.compute_dtype,
    }  # fmt: skip
    file = out / SETTINGS
    if file.is_file():
        found = disk.read_json(file)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(f"{out} holds results of another {name}: choose another --out, or remove it")
    with disk.writing(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        disk.write_json(file, wanted)


def stored(out: Path) -> tasks.Results:
    """All results in a directory that this script wrote."""
    places = sorted(file.parent for file in out.glob(f"*/{QUESTIONS}"))
    return {name: metrics for place in places for name, metrics in _stored_task(out, place.name).items()}


def _stored_task(out: Path, name: str) -> tasks.Results:
    return task_files.read(out / name / QUESTIONS)


def table(chosen: list[Benchmark], ours: tasks.Results, theirs: tasks.Results | None) -> list[list[str]]:
    """Rows of benchmarks by domain, each domain with its mean, beside a baseline if there is one."""
    intervals, rows = tasks.intervals(ours), []
    common = {} if theirs is None else {task: metrics for task, metrics in ours.items() if task in theirs}
    compared = tasks.compare(common, theirs or {})
    for domain in dict.fromkeys(one.domain for one in chosen):
        members = [one for one in chosen if one.domain == domain]
        for one in members:
            for name in one.metrics:
                metric, bounds = ours[one.task][name], intervals[one.task][name]
                shown = _percent if name == one.metrics[0] else _number
                row = [domain, one.name, name.split(",")[0], f"{len(metric.values):,}", shown(metric.figure)]
                row.append(_interval(bounds["low"], bounds["high"], shown))
                rows.append(row + _beside(compared.get(one.task, {}).get(name), shown))
        if len(members) > 1:
            rows.append(_mean(domain, members, ours, None if theirs is None else theirs))
    return [row if theirs is not None else row[: len(COLUMNS)] for row in rows]


def _beside(compared: dict[str, Any] | None, shown: Any) -> list[str]:
    """The cells of a comparison; dashes where the baseline lacks the benchmark, or has no right answer."""
    if compared is None:
        return ["–"] * len(BESIDE)
    if compared["retained"] is None:
        return [shown(compared["baseline"]), "–", "–"]
    kept = _interval(compared["low"], compared["high"], _percent) if compared["low"] is not None else "–"
    return [shown(compared["baseline"]), _percent(compared["retained"]), kept]


def _mean(domain: str, members: list[Benchmark], ours: tasks.Results, theirs: tasks.Results | None) -> list[str]:
    """The row of a domain's mean share of right answers, in which each benchmark counts alike."""
    mine = [_answers(ours, one) for one in members]
    questions = f"{sum(map(len, mine)):,}"
    low, high = _combined(ours, members)
    mean = float(np.mean([answers.mean() for answers in mine]))
    row = [domain, MEAN, "", questions, _percent(mean), _interval(low, high, _percent)]
    if theirs is None or any(one.task not in theirs for one in members):
        return row + _beside(None, _percent)
    other = [_answers(theirs, one) for one in members]
    base = float(np.mean([answers.mean() for answers in other]))
    return row + _beside({"baseline": base} | _kept(mine, other), _percent)


def _answers(results: tasks.Results, one: Benchmark) -> np.ndarray:
    return np.asarray(results[one.task][one.metrics[0]].values, np.float64)


def _combined(results: tasks.Results, members: list[Benchmark]) -> tuple[float, float]:
    """95 % interval of a mean of independent shares from those of each (MOVER, doi:10.1002/sim.3095)."""
    bounds = tasks.intervals(results)
    shares = [results[one.task][one.metrics[0]].figure for one in members]
    ends = [bounds[one.task][one.metrics[0]] for one in members]
    below = np.sqrt(sum((share - end["low"]) ** 2 for share, end in zip(shares, ends, strict=True)))
    above = np.sqrt(sum((end["high"] - share) ** 2 for share, end in zip(shares, ends, strict=True)))
    return float((sum(shares) - below) / len(shares)), float((sum(shares) + above) / len(shares))


def _kept(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float | None]:
    """{retained, low, high} of the ratio of two means over benchmarks, with a paired bootstrap in each benchmark."""
    generator = np.random.default_rng(0)
    means = np.zeros((2, DRAWS))
    for mine, other in zip(ours, theirs, strict=True):
        for draw in range(DRAWS):
            chosen = generator.integers(0, len(mine), len(mine))
            means[:, draw] += mine[chosen].mean(), other[chosen].mean()
    base = sum(other.mean() for other in theirs)
    drawn = means[0][means[1] > 0] / means[1][means[1] > 0]
    if not base or not drawn.size:
        return {"retained": None, "low": None, "high": None}
    low, high = np.percentile(drawn, INTERVAL)
    return {"retained": float(sum(mine.mean() for mine in ours) / base), "low": float(low), "high": float(high)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _number(figure: float) -> str:
    return f"{figure:,.2f}"


def _interval(low: float, high: float, shown: Any) -> str:
    return f"{shown(low).removesuffix('%')}–{shown(high)}"


def _result(given: argparse.Namespace, rows: list[list[str]], ours: tasks.Results) -> dict[str, Any]:
    """The result as `moe-reduce report --document` reads it."""
    options = [f"--limit={given.limit}"] if given.limit is not None else []
    options += [f"--tasks={given.tasks}"] if given.tasks != ALL else []
    options += ["--allow-code"] if given.allow_code else []
    options += ["--adapter=DIR"] if given.adapter else []
    options += ["--data=DIR"] if given.data else []
    options += [f"--baseline={given.baseline}"] if given.baseline else []
    return {
        "title": f"Benchmarks of {_name(given.model)}",
        "command": " ".join(["./launch/benchmarks.sh", str(given.model), *options]),
        "columns": COLUMNS + (BESIDE if given.baseline else []),
        "rows": rows,
        "tasks": tasks.figures(ours),
        "intervals": tasks.intervals(ours),
    }


if __name__ == "__main__":
    sys.exit(main())
