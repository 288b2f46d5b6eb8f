"""Runs -> docs/results/NAME -> tables in documents. No figure in a document is typed by hand.

A result is a directory with summary.json: {"title", "command", "columns", "rows", …}, whatever made it.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from moe_reduce.disk import write_json
from moe_reduce.errors import UserError
from moe_reduce.reduction.pictures import ladder_picture
from moe_reduce.training.comparison import entropy
from moe_reduce.training.metrics import read
from moe_reduce.training.run import SUMMARY

COLUMNS = [
    "model", "parameters", "of the first", "training MFLOP a token", "tokens", "seeds", "validation loss", "gap",
    "accuracy", "tokens/s", "pool use", "a layer's use",
]  # fmt: skip
MARKERS = re.compile(r"(<!-- results:(\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
CURVES = "curves.jsonl"
POINTS = 200  # kept of each curve


def collect(sources: Iterable[Path], title: str, command: str, out: Path) -> None:
    """What several runs found -> out/summary.json and a picture: of training runs, or of reductions."""
    sources = list(sources)
    kinds = {"stages" in summary for source in sources for summary in _summaries(source)}
    if len(kinds) > 1:
        raise UserError("--runs are of train and of reduce: collect them apart")
    out.mkdir(parents=True, exist_ok=True)
    (_collect_reductions if kinds == {True} else _collect_training)(sources, title, command, out)


def _summaries(source: Path) -> list[dict[str, Any]]:
    """Of the runs below a workdir, or in an earlier result."""
    inner = sorted(path.parent for path in source.glob(f"*/{SUMMARY}"))
    own = _summary(source) if (source / SUMMARY).is_file() or not inner else None
    if own is not None and "runs" not in own:
        return [own]
    if inner:  # variants may each have run by itself, so they know better than the summary of all
        return [one for workdir in inner for one in _summaries(workdir)]
    assert own is not None
    return [one for group in own["runs"].values() for one in group]


def _collect_reductions(sources: list[Path], title: str, command: str, out: Path) -> None:
    """A row a reduction, a column a share of the experts: loss behind it, and the share of the accuracy that is left.

    Several seeds: mean, and half of the range. Where a share was pruned and then recovered, the recovered model counts.
    """
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for source in sources:
        for one in _summaries(source):
            groups.setdefault(one["name"], {})[one["seed"]] = one
    ladders = {name: [_ladder(one) for one in seeds.values()] for name, seeds in groups.items()}
    shares = sorted({share for runs in ladders.values() for run in runs for share in run}, reverse=True)
    rows = []
    for name, runs in ladders.items():
        tokens = sum(stage["tokens"] for stage in next(iter(groups[name].values()))["stages"])
        firsts = [one["stages"][0] for one in groups[name].values()]
        cells = [_rung([run[share] for run in runs if share in run], firsts) for share in shares]
        rows.append([name, f"{tokens / 1e6:.1f} M", str(len(runs)), *cells])
    sizes = [_sizes([run[share] for runs in ladders.values() for run in runs if share in run]) for share in shares]
    rows.insert(0, ["parameters", "", "", *sizes])
    ladder_picture({name: next(iter(seeds.values())) for name, seeds in groups.items()}, out / "curves.png")
    runs = {name: [_thin(one) for one in seeds.values()] for name, seeds in groups.items()}
    columns = ["reduction", "training tokens", "seeds", *(f"{share} %" for share in shares)]
    write_json(out / SUMMARY, {"title": title, "command": command, "columns": columns, "rows": rows, "runs": runs})


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
    """Without the expert use of every stage but the first and the last, which a picture shows."""
    stages = [
        stage if place in (0, len(run["stages"]) - 1) else stage | {"expert_use": None}
        for place, stage in enumerate(run["stages"])
    ]
    return run | {"stages": stages}


def _collect_training(sources: list[Path], title: str, command: str, out: Path) -> None:
    """Runs of several seeds -> out/summary.json (a row a model), curves.jsonl (thinned) and curves.png.

    A source is the workdir of a run, of a comparison (which stands for its variants), or an earlier result, so that
    seeds of several days and machines come together. Of two runs of one model and seed, the later source is kept.
    """
    found: dict[tuple[str, int], Measured] = {}
    for source in sources:
        found |= {(one.name, one.summary["seed"]): one for one in _measured(source)}
    groups: dict[str, list[Measured]] = {}
    # the dense baseline, if there is one, is what gaps are measured to
    for one in sorted(found.values(), key=lambda one: one.name != "dense"):
        groups.setdefault(one.name, []).append(one)
    first = next(iter(groups.values()))
    tokens = first[0].summary["tokens"]
    for one in found.values():
        if one.summary["tokens"] != tokens:
            seen = f"{one.summary['tokens']:,}"
            raise UserError(f"{one.name} in {one.source} saw {seen} tokens, {first[0].name} {tokens:,}")
    curves = [one.curve for runs in groups.values() for one in runs]
    (out / CURVES).write_text("".join(json.dumps(curve) + "\n" for curve in curves))
    _picture(curves, title, out / "curves.png")
    summaries = {name: [one.summary for one in runs] for name, runs in groups.items()}
    rows = [_row(name, runs, summaries[first[0].name]) for name, runs in summaries.items()]
    content = {"title": title, "command": command, "columns": COLUMNS, "rows": rows, "runs": summaries}
    write_json(out / SUMMARY, content)


class Measured(NamedTuple):
    """One finished run: what its summary says and its validation curve."""

    name: str
    source: Path
    summary: dict[str, Any]
    curve: dict[str, Any]


def _measured(source: Path) -> list[Measured]:
    inner = sorted(path.parent for path in source.glob(f"*/{SUMMARY}"))
    if inner:
        return [one for workdir in inner for one in _measured(workdir)]
    summary = _summary(source)
    if "runs" not in summary:
        name = summary["name"] or source.name
        return [Measured(name, source, summary, _curve(name, summary, source / "metrics.jsonl"))]
    lines = (source / CURVES).read_text().splitlines()
    curves = {(curve["name"], curve["seed"]): curve for curve in map(json.loads, lines)}
    return [
        Measured(name, source, run, curves[name, run["seed"]]) for name, runs in summary["runs"].items() for run in runs
    ]


def _summary(workdir: Path) -> dict[str, Any]:
    file = workdir / SUMMARY
    if not file.is_file():
        raise UserError(f"{workdir} has no {SUMMARY}: give the workdirs of finished runs, or an earlier result")
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


def _curve(name: str, run: dict[str, Any], metrics: Path) -> dict[str, Any]:
    """Validation loss against tokens, and the FLOPs a token that turn them into FLOPs."""
    lines = [line for line in read(metrics) if line["split"] == "validation"]
    lines = lines[:: max(1, len(lines) // POINTS)]
    per_step = run["tokens"] / run["steps"]
    return {
        "name": name,
        "seed": run["seed"],
        "train_flops_per_token": run["train_flops_per_token"],
        "tokens": [round(line["step"] * per_step) for line in lines],
        "loss": [round(line["loss"], 5) for line in lines],
    }


def _picture(curves: list[dict[str, Any]], title: str, file: Path) -> None:
    figure, (by_tokens, by_flops) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
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
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


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
