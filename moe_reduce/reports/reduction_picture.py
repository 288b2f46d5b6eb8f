"""The six panels of one reduction: loss, number of experts and expert use, before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_reduce.reports import style
from moe_reduce.reports.summaries import Summary, entropy


def picture(stages: Sequence[Summary], file: Path) -> None:
    """Draws loss, entropy of expert use and experts kept by stage; expert use before and after; layers by expert."""
    figure, panels = style.panels(2, 3, (14, 8))
    first, last = stages[0], stages[-1]
    names = [stage["name"] for stage in stages]
    losses = [stage["validation"]["loss"] for stage in stages]
    _steps(panels[0, 0], names, {"": losses})
    panels[0, 0].axhline(losses[0], color=style.GREY, linestyle=":")
    panels[0, 0].set_ylabel("validation loss (nats a token)")
    _entropies(panels[0, 1], stages)
    _steps(panels[0, 2], names, {"": [100 * stage["experts"] / first["experts"] for stage in stages]})
    panels[0, 2].set(ylabel="experts kept (%)", ylim=(0, 105))
    for axes, stage in zip(panels[1, :2], (first, last), strict=True):
        style.heat_map(axes, 100 * np.asarray(stage["expert_use"]), "% of the layer's assignments")
        axes.set(title=f"expert use, {stage['name']}", xlabel="expert", ylabel="layer")
    _served(panels[1, 2], [first, last])
    style.save(figure, file)


def layers_served(expert_use: list[list[float]]) -> np.ndarray:
    """Number of layers in which each expert gets at least a tenth of the mean use."""
    use_NE = np.asarray(expert_use)
    return np.sum(use_NE >= 0.1 / use_NE.shape[1], axis=0)


def _is_pool(stage: Summary) -> bool:
    return len(stage["expert_use"][0]) == stage["experts"]


def _entropies(axes: Axes, stages: Sequence[Summary]) -> None:
    by_layer = [float(np.mean([entropy(row) for row in stage["expert_use"]])) for stage in stages]
    pooled = [entropy(np.mean(stage["expert_use"], axis=0)) if _is_pool(stage) else None for stage in stages]
    _steps(axes, [stage["name"] for stage in stages], {"one layer": by_layer, "all layers": pooled})
    axes.set_ylabel("entropy of expert use (1: even)")


def _steps(axes: Axes, names: list[str], lines: dict[str, list[Any]]) -> None:
    """Draws values by stage; None marks a stage without a value."""
    for (label, values), colour in zip(lines.items(), style.CYCLE, strict=False):
        known = [place for place, value in enumerate(values) if value is not None]
        shown = [values[place] for place in known]
        if known:
            style.line(axes, known, shown, label or None, color=colour, marker="o", markersize=5)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
    if any(lines):
        style.legend_above(axes)


def _served(axes: Axes, stages: Sequence[Summary]) -> None:
    """Histogram of the layers that an expert serves, as bars side by side."""
    layers = len(stages[0]["expert_use"])
    places = np.arange(layers + 1)
    width = 0.8 / len(stages)
    for number, (stage, colour) in enumerate(zip(stages, style.CYCLE, strict=False)):
        served = layers_served(stage["expert_use"]) if _is_pool(stage) else np.ones(stage["experts"], int)
        shares = 100 * np.bincount(served, minlength=layers + 1) / len(served)
        axes.bar(places - 0.4 + width * (number + 0.5), shares, width, color=colour, label=stage["name"])
    axes.set(xlabel="layers that an expert serves", ylabel="experts (%)")
    if layers <= 12:
        axes.set_xticks(places)
    style.legend_above(axes)
