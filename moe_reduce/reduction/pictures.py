"""Pictures of scores: how they are distributed, and where the experts that matter are."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moe_reduce.reduction.scores import Scores


def score_pictures(found: Scores, stem: Path) -> None:
    """STEM-histogram.png and STEM-map.png, a panel a criterion."""
    count = len(found.scores)
    figure, panels = plt.subplots(1, count, figsize=(4 * count, 3.2), squeeze=False)
    for axes, (name, values) in zip(panels[0], found.scores.items(), strict=True):
        axes.hist(values.reshape(-1), bins=50)
        axes.set(title=name, xlabel="score", ylabel="experts")
    _save(figure, stem.with_name(f"{stem.name}-histogram.png"))
    rows = 2 * count if found.counts_by_layer is not None else count
    figure, panels = plt.subplots(rows, 1, figsize=(10, 2.2 * rows), squeeze=False)
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
    _save(figure, stem.with_name(f"{stem.name}-map.png"))


def _save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
