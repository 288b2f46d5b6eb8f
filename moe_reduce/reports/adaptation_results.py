"""The result of adaptations: one row for each method and size, at its best learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.reports import adaptation_picture
from moe_reduce.reports.finished_runs import FinishedRun, Groups
from moe_reduce.reports.summaries import spread
from moe_reduce.training.metrics import read_metrics

Curve = list[list[float]]  # [step, recall of learned pairs, or validation loss] at each evaluation


def result(groups: Groups, title: str, out: Path) -> dict[str, Any]:
    """The rows of the table and the names of the best runs; draws curves.png of recall or of validation loss.

    Learning rates are compared on the seeds that were run at every rate, so a sweep with one seed is enough.
    """
    recalled = _is_recall(groups)
    curves = {name: [_curve(one, recalled) for one in runs] for name, runs in groups.items()}
    steps = _common_steps(curves)
    rows, best = [], {}
    for (method, trained), rates in sorted(_by_size(groups).items(), key=lambda item: item[0][1]):
        name = _best_rate(rates)
        best[f"{method} {trained:,}"], runs = name, rates[name]
        cells = _recalls(runs, curves[name]) if recalled else _perplexities(runs)
        rows.append([*_head(runs, len(rates)), *cells])
    out.mkdir(parents=True, exist_ok=True)
    shown = {label: curves[name][0] for label, name in best.items()}
    adaptation_picture.picture(shown, title, recalled, out / "curves.png")
    columns = ["method", "trained parameters", "of the base", "size", "learning rate", "seeds"]
    columns += [*(f"step {step}" for step in steps), "other pairs"] if recalled else ["validation", "test"]
    kept = {
        name: [one.summary | {"curve": curve} for one, curve in zip(runs, curves[name], strict=True)]
        for name, runs in groups.items()
    }
    return {"columns": columns, "rows": rows, "best": list(best.values()), "runs": kept}


def _is_recall(groups: Groups) -> bool:
    """True for runs that learned completions, whose recall was measured; False for runs on a text."""
    measured = [bool(one.summary["measured"]) for runs in groups.values() for one in runs]
    if any(measured) and not all(measured):
        raise UserError("--runs mixes adaptations to completions and to running text: collect them separately")
    return all(measured)


def _by_size(groups: Groups) -> dict[tuple[str, int], Groups]:
    """{(method, trained parameters): runs by name}; the names in one group differ only in the learning rate."""
    sizes: dict[tuple[str, int], Groups] = {}
    for name, runs in groups.items():
        first = runs[0].summary
        sizes.setdefault((first["method"], first["trained_parameters"]), {})[name] = runs
    return sizes


def _curve(one: FinishedRun, recalled: bool) -> Curve:
    if "curve" in one.summary:  # an earlier result has no metrics.jsonl
        return one.summary["curve"]
    if not (one.source / "metrics.jsonl").is_file():
        raise UserError(f"{one.source} has no metrics.jsonl: give the workdir of a finished run, or an earlier result")
    lines = [line for line in read_metrics(one.source / "metrics.jsonl") if line.get("split") == "validation"]
    return [[line["step"], round(line["recall_train" if recalled else "loss"], 5)] for line in lines]


def _common_steps(curves: dict[str, list[Curve]]) -> list[float]:
    """Steps at which all runs were evaluated; raises UserError for a run that was evaluated at other steps."""
    steps = [step for step, _ in next(iter(curves.values()))[0]]
    for name, found in curves.items():
        if not steps or any([step for step, _ in curve] != steps for curve in found):
            raise UserError(
                f"{name} was not evaluated at steps {steps}, as the first of --runs was: collect it separately"
            )
    return steps


def _best_rate(rates: Groups) -> str:
    """The name of the runs with the best learning rate."""
    swept = set.intersection(*({one.summary["seed"] for one in runs} for runs in rates.values()))
    badness = {
        name: _badness([one for one in runs if one.summary["seed"] in swept] or runs) for name, runs in rates.items()
    }
    return min(badness, key=lambda name: badness[name])


def _badness(runs: list[FinishedRun]) -> float:
    """Ranks a learning rate (lower is better): negative recall for completions, validation loss otherwise."""
    summaries = [one.summary for one in runs]
    if summaries[0]["measured"]:
        return float(np.mean([-summary["measured"]["recall_train"] for summary in summaries]))
    return float(np.mean([summary["validation"]["loss"] for summary in summaries]))


def _head(runs: list[FinishedRun], rates: int) -> list[str]:
    first = runs[0].summary
    return [
        first["method"],
        f"{first['trained_parameters']:,}",
        f"{first['trained_share']:.2%}",
        _size(first["adapter"]),
        f"{first['learning_rate']:g} of {rates}",
        str(len(runs)),
    ]


def _size(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return ""
    return f"k = {adapter['sketch_width']}" if adapter["method"] == "skema" else f"r = {adapter['rank']}"


def _recalls(runs: list[FinishedRun], curves: Sequence[Curve]) -> list[str]:
    cells = [_percent([curve[place][1] for curve in curves]) for place in range(len(curves[0]))]
    return [*cells, _percent([one.summary["measured"]["recall_validation"] for one in runs])]


def _percent(values: Sequence[float]) -> str:
    return spread(values, ".1%")


def _perplexities(runs: list[FinishedRun]) -> list[str]:
    tests = [one.summary["test"]["perplexity"] for one in runs if one.summary.get("test")]
    shown = spread(tests, ".2f") if len(tests) == len(runs) else ""  # only if all seeds have it
    return [spread([one.summary["validation"]["perplexity"] for one in runs], ".2f"), shown]
