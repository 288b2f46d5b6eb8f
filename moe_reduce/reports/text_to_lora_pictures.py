"""Pictures of Text-to-LoRA: the adapters of many tasks on a map, and what a larger library costs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.reports import style

NAMED = style.MOST_LINES - 1  # categories with a colour of their own; all others are grey
OTHERS = "others"


def adapter_map(values_ZX: Any, categories: Sequence[str], unseen: Sequence[bool], file: Path) -> None:
    """Draws a t-SNE map of adapters, one point a task; needs scikit-learn.

    values_ZX: an adapter's numbers in each row. categories: of the tasks; the most frequent ones have colours. unseen:
    tasks that never trained, which are drawn as crosses.
    """
    from sklearn.manifold import TSNE

    scaled_ZX = np.asarray(values_ZX, np.float64)
    scaled_ZX = scaled_ZX / max(float(scaled_ZX.std()), 1e-12)
    perplexity = min(15.0, (len(scaled_ZX) - 1) / 3)
    points_Z2 = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(scaled_ZX)
    figure, ((axes,),) = style.panels(size=(8, 5))
    frequent = [name for name, _ in Counter(categories).most_common(NAMED)]
    colour = style.colours(frequent) | {OTHERS: style.GREY}
    names = np.asarray([name if name in frequent else OTHERS for name in categories])
    crossed = np.asarray(unseen, bool)
    for name in [*frequent, *([OTHERS] if OTHERS in names else [])]:
        for marker, kind in (("o", ~crossed), ("x", crossed)):
            chosen = (names == name) & kind
            label = name if marker == "o" or not np.any((names == name) & ~crossed) else None
            axes.scatter(*points_Z2[chosen].T, color=colour[name], marker=marker, s=36, label=label)
    axes.set(xlabel="t-SNE, first axis", ylabel="t-SNE, second axis", xticks=[], yticks=[])
    axes.set_title("generated adapters (o: tasks that trained, x: unseen tasks)")
    style.legend_beside(axes)
    style.save(figure, file)


def by_tasks(curves: Mapping[str, Mapping[int, float]], label: str, file: Path) -> None:
    """Draws a figure against the number of tasks.

    curves: {name of a line: {tasks: value}}. label: of the value axis.
    """
    figure, ((axes,),) = style.panels(size=(8, 4.5))
    looks = style.looks(list(curves))
    for name, points in curves.items():
        sizes = sorted(points)
        style.line(axes, sizes, [points[size] for size in sizes], name, **looks[name], marker="o")
    every = sorted({size for points in curves.values() for size in points})
    axes.set(xlabel="training tasks", ylabel=label, xscale="log")
    axes.set_xticks(every, [str(size) for size in every])
    axes.minorticks_off()
    style.legend_beside(axes)
    style.save(figure, file)
