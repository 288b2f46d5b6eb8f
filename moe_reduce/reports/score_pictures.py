"""Pictures of the scores of experts: a histogram and a map for each criterion."""

from pathlib import Path

import numpy as np

from moe_reduce.reduction.scores import Scores
from moe_reduce.reports import style


def pictures(found: Scores, stem: Path) -> None:
    """Writes STEM-histogram.png and STEM-map.png."""
    _histograms(found, stem.with_name(f"{stem.name}-histogram.png"))
    _maps(found, stem.with_name(f"{stem.name}-map.png"))


def _histograms(found: Scores, file: Path) -> None:
    count = len(found.scores)
    figure, panels = style.panels(1, count, (4.2 * count, 3.4))
    for axes, (name, values) in zip(panels[0], found.scores.items(), strict=True):
        axes.hist(values.reshape(-1), bins=50, color=style.CYCLE[0])
        axes.set(title=name, xlabel="score", ylabel="experts")
        axes.locator_params(axis="x", nbins=5)
    style.save(figure, file)


def _maps(found: Scores, file: Path) -> None:
    """Draws a map for each criterion; for a pool these have one row, and a map of assignments by layer follows."""
    maps = {name: (values, "pool" if len(values) == 1 else "layer", name) for name, values in found.scores.items()}
    if found.counts_by_layer is not None:
        title = "assignments by the layer that calls the pool"
        maps[title] = (np.asarray(found.counts_by_layer), "layer", "assignments")
    heights = [1.2 + 0.25 * min(len(values), 12) for values, _, _ in maps.values()]
    figure, panels = style.panels(len(maps), 1, (10, sum(heights)), heights=heights)
    for axes, (title, (values, rows, unit)) in zip(panels[:, 0], maps.items(), strict=True):
        style.heat_map(axes, values, unit)
        axes.set(title=title, xlabel="expert", ylabel=rows)
        if len(values) == 1:
            axes.set_yticks([])
    style.save(figure, file)
