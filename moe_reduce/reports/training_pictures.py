"""Loss curves: of the runs in a workdir, and of the pretraining runs of a result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_reduce.reports import style
from moe_reduce.training.metrics import read_metrics

Curve = dict[str, Any]  # name, seed, tokens, loss and train_flops_per_token of one run
LOSS = "validation loss (nats a token)"


def loss_picture(workdirs: Mapping[str, Path], file: Path) -> None:
    """Training loss (thin) and validation loss (thick, with markers) of each run against steps."""
    groups = style.charts(list(workdirs))
    figure, panels = style.panels(len(groups), 1, (9, 4.8 * len(groups)))
    for axes, names in zip(panels[:, 0], groups, strict=True):
        looks = style.looks(names)
        for name in names:
            lines = read_metrics(workdirs[name] / "metrics.jsonl")
            steps, losses = _points(lines, "train")
            style.line(axes, steps, losses, color=looks[name]["color"], alpha=0.3, linewidth=0.8)
            steps, losses = _points(lines, "validation")
            if steps:
                style.line(axes, steps, losses, name or "validation", **looks[name], marker=".", linewidth=2)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title="thin: training, thick: validation")
        style.label_ends(axes)
    style.save(figure, file)


def _points(lines: list[dict[str, Any]], split: str) -> tuple[list[float], list[float]]:
    found = [line for line in lines if line.get("split") == split and "loss" in line]
    return [line["step"] for line in found], [line["loss"] for line in found]


def curves_picture(curves: Sequence[Curve], title: str, file: Path) -> None:
    """Validation loss of several models, the mean over seeds as a line and their range as a band.

    Two models: against tokens and against training FLOPs. More: against training FLOPs, and the gap to the first model
    against tokens. More than eight models are split into rows of panels, and each row repeats the first model.
    curves: as in curves.jsonl of a result, in the order of its table.
    """
    seeds: dict[str, list[Curve]] = {}
    for curve in curves:
        seeds.setdefault(curve["name"], []).append(curve)
    groups = style.charts(list(seeds), repeat_first=True)
    figure, panels = style.panels(len(groups), 2, (13, 4.4 * len(groups)))
    figure.suptitle(title, fontsize=style.FONT + 1)
    for (left, right), names in zip(panels, groups, strict=True):
        drawn = {name: seeds[name] for name in names}
        if len(seeds) > 2:
            _by_flops(left, drawn)
            _gaps(right, drawn)
        else:
            _by_tokens(left, drawn)
            _by_flops(right, drawn)
    for axes in panels[:, 1]:
        style.label_ends(axes)
    style.save(figure, file)


def _by_tokens(axes: Axes, seeds: Mapping[str, list[Curve]]) -> None:
    looks = style.looks(list(seeds))
    for name, runs in seeds.items():
        tokens, losses = _on_one_grid(runs)
        _band(axes, tokens / 1e6, losses, name, looks[name])
    axes.set(xlabel="tokens (millions)", ylabel=LOSS)


def _by_flops(axes: Axes, seeds: Mapping[str, list[Curve]]) -> None:
    looks = style.looks(list(seeds))
    for name, runs in seeds.items():
        tokens, losses = _on_one_grid(runs)
        _band(axes, tokens * runs[0]["train_flops_per_token"] / 1e12, losses, name, looks[name])
    axes.set(xlabel="training FLOPs (10¹²)", ylabel=LOSS, xscale="log")
    style.log_ticks(axes.xaxis)


def _gaps(axes: Axes, seeds: Mapping[str, list[Curve]]) -> None:
    """Draws gaps of mean loss to the first model, without the first quarter of training, where gaps are large."""
    looks = style.looks(list(seeds))
    first, *_ = seeds
    base_tokens, base = _on_one_grid(seeds[first])
    for name, runs in seeds.items():
        tokens, losses = _on_one_grid(runs)
        gap = np.mean(losses, axis=0) - np.interp(tokens, base_tokens, np.mean(base, axis=0))
        late = tokens >= tokens[-1] / 4
        style.line(axes, tokens[late] / 1e6, gap[late], name, **looks[name])
    axes.set(xlabel="tokens (millions), last three quarters", ylabel=f"gap to {first} (nats a token)")


def _on_one_grid(runs: Sequence[Curve]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(tokens of the first seed's evaluations, validation loss of each seed there)."""
    tokens = np.asarray(runs[0]["tokens"], float)
    return tokens, [np.interp(tokens, run["tokens"], run["loss"]) for run in runs]


def _band(axes: Axes, x: np.ndarray, losses: Sequence[np.ndarray], label: str, look: dict[str, Any]) -> None:
    """Draws the mean of several seeds as a line, and their range as a band."""
    style.line(axes, x, np.mean(losses, axis=0), label, **look)
    if len(losses) > 1:
        low, high = np.min(losses, axis=0), np.max(losses, axis=0)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
