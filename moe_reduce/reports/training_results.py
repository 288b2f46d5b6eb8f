"""The result of pretraining runs: one row for each model, with gaps to the first one."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.core import json_files
from moe_reduce.core.disk import write_text
from moe_reduce.core.errors import UserError
from moe_reduce.reports import training_pictures
from moe_reduce.reports.finished_runs import FinishedRun, Groups
from moe_reduce.reports.summaries import Summary, entropy, spread
from moe_reduce.training.metrics import read_metrics

COLUMNS = [
    "model", "parameters", "of the first", "training MFLOP a token", "tokens", "seeds", "validation loss", "gap",
    "accuracy", "tokens/s", "pool use", "a layer's use",
]  # fmt: skip
CURVES = "curves.jsonl"
POINTS = 200  # points kept of each curve


def result(groups: Groups, title: str, out: Path) -> dict[str, Any]:
    """The rows of the table; writes curves.jsonl (at most about 200 validation losses of each run) and curves.png."""
    first = next(iter(groups.values()))
    _check_same_tokens(groups, first[0])
    out.mkdir(parents=True, exist_ok=True)
    curves = [_curve(one) for runs in groups.values() for one in runs]
    write_text(out / CURVES, "".join(json.dumps(curve) + "\n" for curve in curves))
    training_pictures.curves_picture(curves, title, out / "curves.png")
    summaries = {name: [one.summary for one in runs] for name, runs in groups.items()}
    rows = [_row(name, runs, summaries[first[0].name]) for name, runs in summaries.items()]
    return {"columns": COLUMNS, "rows": rows, "runs": summaries}


def _check_same_tokens(groups: Groups, first: FinishedRun) -> None:
    tokens = first.summary["tokens"]
    for one in (one for runs in groups.values() for one in runs):
        if one.summary["tokens"] != tokens:
            seen = f"{one.summary['tokens']:,}"
            raise UserError(
                f"{one.name} in {one.source} saw {seen} tokens, {first.name} {tokens:,}: collect them separately"
            )


def _row(name: str, runs: list[Summary], first: list[Summary]) -> list[str]:
    baseline = {run["seed"]: run["validation"]["loss"] for run in first}
    gaps = [run["validation"]["loss"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
    speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
    use = runs[0]["expert_use"]
    return [
        name,
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['parameters'] / first[0]['parameters']:.1%}",
        f"{runs[0]['train_flops_per_token'] / 1e6:.2f}",
        _tokens(runs[0]),
        ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"])),
        spread([run["validation"]["loss"] for run in runs]),
        "" if runs is first else spread(gaps, "+.4f"),
        f"{np.mean([run['validation']['accuracy'] for run in runs]):.2%}",
        f"{np.median(speeds):,.0f}" if speeds else "",
        f"{entropy(np.mean(use, axis=0)):.2f}" if use else "",
        f"{np.mean([entropy(layer) for layer in use]):.2f}" if use else "",
    ]


def _tokens(run: Summary) -> str:
    """Tokens read, and how often that is the whole training text, if the run says how long that is."""
    text = run.get("data", {}).get("training_tokens")
    return f"{run['tokens'] / 1e6:.2f} M" + (f", {run['tokens'] / text:.1f}× its text" if text else "")


def _curve(one: FinishedRun) -> dict[str, Any]:
    """Validation loss against tokens, and FLOPs per token, which convert tokens to FLOPs."""
    run = one.summary
    if (one.source / CURVES).is_file():  # an earlier result has no metrics.jsonl
        kept = json_files.read_lines(one.source / CURVES)
        return next(curve for curve in kept if (curve["name"], curve["seed"]) == (one.name, run["seed"]))
    lines = [line for line in read_metrics(one.source / "metrics.jsonl") if line.get("split") == "validation"]
    lines = lines[:: max(1, len(lines) // POINTS)]
    per_step = run["tokens"] / run["steps"]
    return {
        "name": one.name,
        "seed": run["seed"],
        "train_flops_per_token": run["train_flops_per_token"],
        "tokens": [round(line["step"] * per_step) for line in lines],
        "loss": [round(line["loss"], 5) for line in lines],
    }
