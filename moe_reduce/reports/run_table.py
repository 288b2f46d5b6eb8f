"""Runs side by side: the table, the picture, and one summary of all."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.reports import drawing
from moe_reduce.training.metrics import read_metrics

Summary = dict[str, Any]


def table(summaries: list[Summary]) -> str:
    """One column a model, one row a figure; gaps are to the baseline."""
    names = [summary["name"] or "model" for summary in summaries]
    components = sorted({name for summary in summaries for name in summary["by_component"]})
    rows = [("", names), ("parameters", [f"{s['parameters']:,}" for s in summaries])]
    for component in components:
        rows.append((f"  {component}", [f"{s['by_component'].get(component, 0):,}" for s in summaries]))
    first = baseline(summaries)
    named = first["name"] or "model"
    rows += [
        (f"share of {named}", [f"{s['parameters'] / first['parameters']:.1%}" for s in summaries]),
        ("bytes (fp32)", [f"{s['bytes'] / 1e6:,.2f} MB" for s in summaries]),
        ("training FLOPs a token", [f"{s['train_flops_per_token'] / 1e6:,.2f} M" for s in summaries]),
        ("tokens", [f"{s['tokens']:,}" for s in summaries]),
        ("validation loss (nats)", [f"{s['validation']['loss']:.4f}" for s in summaries]),
        ("validation perplexity", [f"{s['validation']['perplexity']:.2f}" for s in summaries]),
        ("next-token accuracy", [f"{s['validation']['accuracy']:.2%}" for s in summaries]),
        (f"gap to {named}", [f"{s['validation']['loss'] - first['validation']['loss']:+.4f}" for s in summaries]),
        ("tokens/s", [_or_dash(s["tokens_per_second"], "{:,.0f}") for s in summaries]),
        ("MFU", [_or_dash(s["mfu"], "{:.1%}") for s in summaries]),
        ("compile seconds", [f"{s['compile_seconds']:.1f}" for s in summaries]),
        ("expert use", [_use(s["expert_use"]) for s in summaries]),
    ]
    return align(rows)


def baseline(summaries: list[Summary]) -> Summary:
    """The run that others are set against: a dense model, or a base that trained whole; else the first."""
    return next((summary for summary in summaries if is_baseline(summary["name"], summary)), summaries[0])


def is_baseline(name: str, summary: Summary) -> bool:
    """name: of the run, where its summary has none."""
    return name == "dense" or ("method" in summary and summary["method"] == "full")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _use(shares: list[list[float]] | None) -> str:
    """Entropy of the pooled use and of a layer's, as shares of the maximum, and experts under a tenth of the mean."""
    if shares is None:
        return "-"
    pooled = np.mean(shares, axis=0)
    dead = int(np.sum(pooled < 0.1 / len(pooled)))
    by_layer = float(np.mean([entropy(layer) for layer in shares]))
    return f"entropy {entropy(pooled):.2f}, a layer {by_layer:.2f}, unused {dead}"


def entropy(shares: Any) -> float:
    """Entropy of a distribution relative to the uniform one: 1 when balanced, 0 when one takes all."""
    shares = np.asarray(shares, np.float64)
    used = shares[shares > 0]
    return float(-np.sum(used * np.log(used)) / math.log(len(shares))) if len(shares) > 1 else 1.0


def align(rows: list[tuple[str, list[str]]]) -> str:
    """Rows of cells -> lines with aligned columns."""
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(rows[0][1]))]
    label = max(len(name) for name, _ in rows)
    lines = [
        name.ljust(label) + "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def plot(workdirs: dict[str, Path], file: Path) -> None:
    """Training (thin) and validation (thick) loss of every run against steps."""
    figure, [[axes]] = drawing.panels()
    for index, (name, workdir) in enumerate(workdirs.items()):
        lines = read_metrics(workdir / "metrics.jsonl")
        for split, (alpha, linewidth) in (("train", (0.3, 0.8)), ("validation", (1.0, 2.0))):
            points = [(line["step"], line["loss"]) for line in lines if line["split"] == split]
            if points:
                steps, losses = zip(*points, strict=True)
                label = f"{name or 'model'} {split}" if split == "validation" or not name else None
                axes.plot(steps, losses, color=f"C{index}", label=label, alpha=alpha, linewidth=linewidth)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.save(figure, file)
