"""Pictures of scores, and of what a reduction did."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.reduction.scores import Scores
from moe_reduce.reports import drawing
from moe_reduce.reports.run_table import entropy

Summary = dict[str, Any]


def score_pictures(found: Scores, stem: Path) -> None:
    """STEM-histogram.png and STEM-map.png, a panel a criterion."""
    count = len(found.scores)
    figure, panels = drawing.panels(1, count, (4 * count, 3.2))
    for axes, (name, values) in zip(panels[0], found.scores.items(), strict=True):
        axes.hist(values.reshape(-1), bins=50)
        axes.set(title=name, xlabel="score", ylabel="experts")
    drawing.save(figure, stem.with_name(f"{stem.name}-histogram.png"))
    rows = 2 * count if found.counts_by_layer is not None else count
    figure, panels = drawing.panels(rows, 1, (10, 2.2 * rows))
    for axes, (name, values) in zip(panels[:count, 0], found.scores.items(), strict=True):
        image = axes.imshow(values, aspect="auto", interpolation="nearest")
        axes.set(title=name, xlabel="expert", ylabel="layer" if len(values) > 1 else "pool")
        figure.colorbar(image, ax=axes)
    if found.counts_by_layer is not None:
        axes = panels[count, 0]
        image = axes.imshow(found.counts_by_layer, aspect="auto", interpolation="nearest")
        axes.set(title="assignments by the layer that calls", xlabel="expert", ylabel="layer")
        figure.colorbar(image, ax=axes)
        for unused in panels[count + 1 :, 0]:
            unused.remove()
    drawing.save(figure, stem.with_name(f"{stem.name}-map.png"))


def ladder_picture(summaries: dict[str, Summary], file: Path) -> None:
    """Validation loss against the share of the experts kept: a line for each reduction, its best at each share."""
    figure, [[axes]] = drawing.panels()
    for number, (name, summary) in enumerate(summaries.items()):
        first = summary["stages"][0]["experts"]
        best: dict[float, float] = {}
        for stage in summary["stages"]:
            share = 100 * stage["experts"] / first
            best[share] = (
                min(best[share], stage["validation"]["loss"]) if share in best else stage["validation"]["loss"]
            )
        shares = sorted(best, reverse=True)
        line = "-" if number < 10 else "--"  # colours repeat
        axes.plot(shares, [best[share] for share in shares], line, marker="o", label=name or "loss")
    axes.set(xlabel="experts kept (%)", ylabel="validation loss (nats a token)", xlim=(105, 0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.save(figure, file)


def reduction_picture(stages: list[Summary], file: Path) -> None:
    """Loss, router entropy, expert use by layer before and after, and how many layers each expert serves."""
    figure, panels = drawing.panels(2, 3, (15, 7.5))
    names = [stage["name"] for stage in stages]
    places = range(len(stages))
    _steps(panels[0, 0], names, [stage["validation"]["loss"] for stage in stages], "validation loss (nats a token)")
    panels[0, 0].plot(places, [stages[0]["validation"]["loss"]] * len(stages), color="grey", linestyle=":")
    by_layer = [float(np.mean([entropy(row) for row in stage["expert_use"]])) for stage in stages]
    pooled = [entropy(np.mean(stage["expert_use"], axis=0)) if _is_pool(stage) else None for stage in stages]
    _steps(panels[0, 1], names, by_layer, "entropy of expert use (1: even)", "of a layer")
    _steps(panels[0, 1], names, pooled, "entropy of expert use (1: even)", "of all layers together")
    panels[0, 1].legend(fontsize=8)
    _steps(panels[0, 2], names, [100 * stage["experts"] / stages[0]["experts"] for stage in stages], "experts kept (%)")
    for axes, stage in zip(panels[1, :2], (stages[0], stages[-1]), strict=True):
        image = axes.imshow(np.asarray(stage["expert_use"]), aspect="auto", interpolation="nearest")
        axes.set(title=f"expert use, {stage['name']}", xlabel="expert", ylabel="layer")
        figure.colorbar(image, ax=axes)
    for stage in (stages[0], stages[-1]):
        served = layers_served(stage["expert_use"]) if _is_pool(stage) else np.ones(stage["experts"])
        bins = np.arange(0, len(stage["expert_use"]) + 2) - 0.5
        panels[1, 2].hist(
            served, bins=bins, alpha=0.6, label=stage["name"], weights=np.full(len(served), 1 / len(served))
        )
    panels[1, 2].set(xlabel="layers that an expert serves", ylabel="share of the experts")
    panels[1, 2].legend(fontsize=8)
    drawing.save(figure, file)


def _is_pool(stage: Summary) -> bool:
    return len(stage["expert_use"][0]) == stage["experts"]


def layers_served(expert_use: list[list[float]]) -> np.ndarray:
    """For each expert, the number of layers in which it gets a tenth of the mean share or more."""
    use_NE = np.asarray(expert_use)
    return np.sum(use_NE >= 0.1 / use_NE.shape[1], axis=0)


def _steps(axes, names: list[str], values: list[Any], label: str, line: str | None = None) -> None:
    axes.plot(range(len(names)), values, marker="o", label=line)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set(ylabel=label)
    axes.grid(alpha=0.3)
