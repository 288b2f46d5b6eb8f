"""Runs -> docs/results/NAME -> tables in documents. No figure in a document is typed by hand.

A result is a directory with summary.json: {"title", "command", "columns", "rows", …}, whatever made it.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_reduce.core.disk import read_json, write_json, write_text
from moe_reduce.core.errors import UserError
from moe_reduce.reports import drawing
from moe_reduce.reports.reduction_pictures import ladder_picture
from moe_reduce.reports.run_table import entropy, is_baseline
from moe_reduce.training.metrics import read_metrics

COLUMNS = [
    "model", "parameters", "of the first", "training MFLOP a token", "tokens", "seeds", "validation loss", "gap",
    "accuracy", "tokens/s", "pool use", "a layer's use",
]  # fmt: skip
SUMMARY = "summary.json"
MARKERS = re.compile(r"(<!-- results:(\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
CURVES = "curves.jsonl"
POINTS = 200  # kept of each curve


def collect(sources: Iterable[Path], title: str, command: str, out: Path) -> None:
    """What several runs found -> out/summary.json and pictures: of training runs, or of reductions.

    A source is the workdir of a run, of a comparison (which stands for its variants), or an earlier result, so that
    seeds of several days and machines come together. Of two runs of one model and seed, the later source is kept.
    """
    found = {(one.name, one.summary["seed"]): one for source in sources for one in _measured(source)}
    groups: dict[str, list[Measured]] = {}
    # the baseline, if there is one, is what gaps are measured to
    for one in sorted(found.values(), key=lambda one: not is_baseline(one.name, one.summary)):
        groups.setdefault(one.name, []).append(one)
    kinds = {_kind(one.summary) for one in found.values()}
    if len(kinds) > 1:
        raise UserError(f"--runs are of {' and of '.join(sorted(kinds))}: collect them apart")
    collectors = {"reduce": _reductions, "adapt": _adaptations, "train": _trainings}
    content = collectors[kinds.pop()](groups, title, out)
    write_json(out / SUMMARY, {"title": title, "command": command} | content)


def _kind(summary: dict[str, Any]) -> str:
    """The command whose summary it is."""
    if "stages" in summary:
        return "reduce"
    return "adapt" if "trained_parameters" in summary else "train"


class Measured(NamedTuple):
    """One finished run: its name, what its summary says, and the directory that this was found in."""

    name: str
    source: Path
    summary: dict[str, Any]


def _measured(source: Path) -> list[Measured]:
    file = source / SUMMARY
    own: dict[str, Any] = read_json(file) if file.is_file() else {"runs": {}}
    if "runs" not in own and "name" not in own:
        raise UserError(f"{file} is not of a run of train, reduce or adapt: give their workdirs, or an earlier result")
    if "runs" not in own:
        return [Measured(own["name"] or source.name, source, own)]
    inner = sorted(path.parent for path in source.glob(f"*/{SUMMARY}"))
    if inner:  # variants may each have run by itself, so they know better than the summary of all
        return [one for workdir in inner for one in _measured(workdir)]
    if not own["runs"]:
        raise UserError(f"{source} has no {SUMMARY}: give the workdirs of finished runs, or an earlier result")
    return [Measured(name, source, run) for name, runs in own["runs"].items() for run in runs]


def _reductions(groups: dict[str, list[Measured]], title: str, out: Path) -> dict[str, Any]:
    """A row a reduction, a column a share of the experts: loss behind it, and the share of the accuracy that is left.

    Losses compare where those of the first models do, which a column gives; shares are of each run's own first model.

    Several seeds: mean, and half of the range. Where a share was pruned and then recovered, the recovered model counts.
    """
    del title
    ladders = {name: [_ladder(one.summary) for one in runs] for name, runs in groups.items()}
    shares = sorted({share for runs in ladders.values() for run in runs for share in run}, reverse=True)
    rows = []
    for name, runs in sorted(ladders.items()):
        tokens = sum(stage["tokens"] for stage in groups[name][0].summary["stages"])
        firsts = [one.summary["stages"][0] for one in groups[name]]
        cells = [_rung([run[share] for run in runs if share in run], firsts) for share in shares]
        before = _spread([first["validation"]["loss"] for first in firsts], digits=3)
        rows.append([name, f"{tokens / 1e6:.1f} M", str(len(runs)), before, *cells])
    sizes = [_sizes([run[share] for runs in ladders.values() for run in runs if share in run]) for share in shares]
    out.mkdir(parents=True, exist_ok=True)
    ladder_picture({name: runs[0].summary for name, runs in groups.items()}, out / "curves.png")
    return {
        "columns": ["reduction", "training tokens", "seeds", "first model", *(f"{share} %" for share in shares)],
        "rows": [["parameters", "", "", "", *sizes], *rows],
        "runs": {name: [_thin(one.summary) for one in runs] for name, runs in groups.items()},
    }


def _sizes(stages: list[dict[str, Any]]) -> str:
    """Parameters; from the fewest to the most, where pools with routers of their own for the layers have more."""
    counts = sorted({stage["parameters"] for stage in stages})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _ladder(run: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The last stage at each share of the experts, in percent."""
    first = run["stages"][0]["experts"]
    return {round(100 * stage["experts"] / first): stage for stage in run["stages"]}


def _rung(stages: list[dict[str, Any]], firsts: list[dict[str, Any]]) -> str:
    if not stages:
        return ""
    kept = np.mean([stage["validation"]["accuracy"] for stage in stages])
    kept /= np.mean([first["validation"]["accuracy"] for first in firsts])
    return f"{_spread([stage['validation']['loss'] for stage in stages], digits=3)} ({kept:.1%})"


def _thin(run: dict[str, Any]) -> dict[str, Any]:
    """Without the use of every expert in every layer, which a run's own picture shows."""
    return run | {"stages": [{k: v for k, v in stage.items() if k != "expert_use"} for stage in run["stages"]]}


def _adaptations(groups: dict[str, list[Measured]], title: str, out: Path) -> dict[str, Any]:
    """A row for each method and size, at its best learning rate; curves.png of recall or validation loss.

    The rate is chosen by what the seeds have in common, so that a sweep with one seed serves several.
    """
    sizes: dict[tuple[str, int], dict[str, list[Measured]]] = {}
    for name, runs in groups.items():
        first = runs[0].summary
        sizes.setdefault((first["method"], first["trained_parameters"]), {})[name] = runs
    asked = all(one.summary["measured"] for runs in groups.values() for one in runs)
    if not asked and any(one.summary["measured"] for runs in groups.values() for one in runs):
        raise UserError("--runs are of completions and of text: collect them apart")
    curves = {name: [_learning(one, asked) for one in runs] for name, runs in groups.items()}
    steps = [step for step, _ in next(iter(curves.values()))[0]]
    for name, found in curves.items():
        if not steps or any([step for step, _ in curve] != steps for curve in found):
            raise UserError(f"{name} was not evaluated at steps {steps}, as the first of --runs: collect it apart")
    rows, best = [], {}
    for (method, trained), rates in sorted(sizes.items(), key=lambda item: item[0][1]):
        swept = set.intersection(*({one.summary["seed"] for one in runs} for runs in rates.values()))
        badness = {
            name: _badness([one for one in runs if one.summary["seed"] in swept] or runs)
            for name, runs in rates.items()
        }
        name = min(badness, key=lambda name: badness[name])
        best[f"{method} {trained:,}"], runs = name, rates[name]
        rows.append(
            [
                method,
                f"{trained:,}",
                f"{runs[0].summary['trained_share']:.2%}",
                _size(runs[0].summary["adapter"]),
                f"{runs[0].summary['learning_rate']:g} of {len(rates)}",
                str(len(runs)),
                *(_recalls(runs, curves[name], steps) if asked else _perplexities(runs)),
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    shown = {label: curves[name][0] for label, name in best.items()}
    _adaptation_picture(shown, title, "recall of learned pairs" if asked else "validation loss", out / "curves.png")
    columns = ["method", "trained parameters", "of the base", "size", "learning rate", "seeds"]
    columns += [*(f"step {step}" for step in steps), "other pairs"] if asked else ["validation", "test"]
    kept = {
        name: [one.summary | {"curve": curve} for one, curve in zip(runs, curves[name], strict=True)]
        for name, runs in groups.items()
    }
    return {"columns": columns, "rows": rows, "best": list(best.values()), "runs": kept}


def _learning(one: Measured, asked: bool) -> list[list[float]]:
    """[step, recall of learned pairs, or validation loss] at each evaluation."""
    if "curve" in one.summary:  # an earlier result has no metrics any more
        return one.summary["curve"]
    if not (one.source / "metrics.jsonl").is_file():
        raise UserError(f"{one.source} has no metrics.jsonl: give the workdir of a finished run, or an earlier result")
    lines = [line for line in read_metrics(one.source / "metrics.jsonl") if line["split"] == "validation"]
    return [[line["step"], round(line["recall_train" if asked else "loss"], 5)] for line in lines]


def _recalls(runs: list[Measured], curves: list[list[list[float]]], steps: list[float]) -> list[str]:
    cells = [_percent([curve[place][1] for curve in curves]) for place in range(len(steps))]
    return [*cells, _percent([one.summary["measured"]["recall_validation"] for one in runs])]


def _perplexities(runs: list[Measured]) -> list[str]:
    tests = [one.summary["test"]["perplexity"] for one in runs if one.summary.get("test")]
    shown = _spread(tests, digits=2) if len(tests) == len(runs) else ""  # of all seeds, or not at all
    return [_spread([one.summary["validation"]["perplexity"] for one in runs], digits=2), shown]


def _badness(runs: list[Measured]) -> float:
    """Of a learning rate: what is not recalled where completions are learned, and the loss elsewhere."""
    summaries = [one.summary for one in runs]
    if summaries[0]["measured"]:
        return float(np.mean([-summary["measured"]["recall_train"] for summary in summaries]))
    return float(np.mean([summary["validation"]["loss"] for summary in summaries]))


def _percent(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.1%}" + (f" ± {half:.1%}" if len(values) > 1 else "")


def _size(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return ""
    return f"k = {adapter['sketch_width']}" if adapter["method"] == "skema" else f"r = {adapter['rank']}"


def _adaptation_picture(curves: dict[str, list[list[float]]], title: str, label: str, file: Path) -> None:
    """A line a method and size, of its first seed, against steps."""
    figure, [[axes]] = drawing.panels()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), "o-", label=name)
    axes.set(xlabel="step", ylabel=label)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.save(figure, file)


def _trainings(groups: dict[str, list[Measured]], title: str, out: Path) -> dict[str, Any]:
    """A row a model, gaps to the first; also curves.jsonl (thinned) and curves.png."""
    first = next(iter(groups.values()))
    tokens = first[0].summary["tokens"]
    for one in (one for runs in groups.values() for one in runs):
        if one.summary["tokens"] != tokens:
            seen = f"{one.summary['tokens']:,}"
            raise UserError(f"{one.name} in {one.source} saw {seen} tokens, {first[0].name} {tokens:,}")
    out.mkdir(parents=True, exist_ok=True)
    curves = [_curve(one) for runs in groups.values() for one in runs]
    write_text(out / CURVES, "".join(json.dumps(curve) + "\n" for curve in curves))
    _picture(curves, title, out / "curves.png")
    summaries = {name: [one.summary for one in runs] for name, runs in groups.items()}
    rows = [_row(name, runs, summaries[first[0].name]) for name, runs in summaries.items()]
    return {"columns": COLUMNS, "rows": rows, "runs": summaries}


def _summary(directory: Path) -> dict[str, Any]:
    file = directory / SUMMARY
    if not file.is_file():
        raise UserError(f"{directory} has no {SUMMARY}: make it with moe-reduce report --runs")
    return json.loads(file.read_text())


def _row(name: str, runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[str]:
    baseline = {run["seed"]: run["validation"]["loss"] for run in first}
    gaps = [run["validation"]["loss"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    use = runs[0]["expert_use"]
    return [
        name,
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['parameters'] / first[0]['parameters']:.1%}",
        f"{runs[0]['train_flops_per_token'] / 1e6:.2f}",
        f"{runs[0]['tokens'] / 1e6:.2f} M",
        ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"])),
        _spread([run["validation"]["loss"] for run in runs]),
        "" if runs is first else _spread(gaps, sign=True),
        f"{np.mean([run['validation']['accuracy'] for run in runs]):.2%}",
        f"{np.median(speeds):,.0f}" if speeds else "",
        f"{entropy(np.mean(use, axis=0)):.2f}" if use else "",
        f"{np.mean([entropy(layer) for layer in use]):.2f}" if use else "",
    ]


def _spread(values: list[float], sign: bool = False, digits: int = 4) -> str:
    """Mean, and half of the range where there are several."""
    if not values:
        return ""
    mean = f"{np.mean(values):+.{digits}f}" if sign else f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def _curve(one: Measured) -> dict[str, Any]:
    """Validation loss against tokens, and the FLOPs a token that turn them into FLOPs."""
    run = one.summary
    if (one.source / CURVES).is_file():  # an earlier result has no metrics any more
        kept = [json.loads(line) for line in (one.source / CURVES).read_text().splitlines()]
        return next(curve for curve in kept if (curve["name"], curve["seed"]) == (one.name, run["seed"]))
    lines = [line for line in read_metrics(one.source / "metrics.jsonl") if line["split"] == "validation"]
    lines = lines[:: max(1, len(lines) // POINTS)]
    per_step = run["tokens"] / run["steps"]
    return {
        "name": one.name,
        "seed": run["seed"],
        "train_flops_per_token": run["train_flops_per_token"],
        "tokens": [round(line["step"] * per_step) for line in lines],
        "loss": [round(line["loss"], 5) for line in lines],
    }


def _picture(curves: list[dict[str, Any]], title: str, file: Path) -> None:
    figure, [[by_tokens, by_flops]] = drawing.panels(1, 2, (12, 5), sharey=True)
    names = list(dict.fromkeys(curve["name"] for curve in curves))
    for curve in curves:
        color = f"C{names.index(curve['name']) % 10}"
        label = curve["name"] if curve is next(c for c in curves if c["name"] == curve["name"]) else None
        tokens = np.asarray(curve["tokens"], float)
        by_tokens.plot(tokens / 1e6, curve["loss"], color=color, label=label, linewidth=1.2)
        by_flops.plot(tokens * curve["train_flops_per_token"] / 1e12, curve["loss"], color=color, linewidth=1.2)
    by_tokens.set(xlabel="tokens (millions)", ylabel="validation loss (nats a token)", title=title)
    by_flops.set(xlabel="training FLOPs (10¹²)", xscale="log")
    for axes in (by_tokens, by_flops):
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize=8)
    drawing.save(figure, file)


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, with the command that made it."""
    lines = [f"**{result['title']}** (`{result['command']}`)", "", _cells(result["columns"])]
    lines += [_cells(["---"] * len(result["columns"])), *(_cells(row) for row in result["rows"])]
    return "\n".join(lines) + "\n"


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def fill(document: Path, results: Path) -> str:
    """The document's text with every marked table made anew from results/NAME/summary.json."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{markdown(_summary(results / match[2]))}{match[3]}"

    if not document.is_file():
        raise UserError(f"--document={document} does not exist")
    text, count = MARKERS.subn(table, document.read_text())
    if count == 0:
        raise UserError(f"{document} has no place for a table: write <!-- results:NAME --> and <!-- /results -->")
    return text
