"""The picture of how time and memory grow with the sizes of model, batch and mesh."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from moe_reduce.reports import style

Points = Mapping[Any, float]  # size -> value; sizes are strings in a summary.json
LAYER = {"seconds of a layer, by experts": "experts of a layer", "seconds of a layer, by tokens": "tokens"}
SIZES = {
    "layers": "layers",
    "experts": "experts of a layer",
    "length": "tokens of a sequence",
    "data": "devices, mesh.data",
    "expert": "devices, mesh.expert",
}


def picture(curves: Mapping[str, Mapping[str, Points]], file: Path) -> None:
    """Draws three rows of panels: seconds of a layer, tokens/s of a training step, bytes of a device.

    curves: {title: {label of a line: points}}, which is "curves" in the summary.json of launch/bench_scale.py.
    """
    steps, memory = curves["tokens/s of a training step"], curves["bytes of a device"]
    columns = max(len(steps), len(LAYER))
    figure, panels = style.panels(3, columns, (2.9 * columns, 9))
    for row, used in enumerate((len(LAYER), len(steps), len(steps))):
        for unused in panels[row, used:]:
            unused.remove()
    for axes, (title, size) in zip(panels[0], LAYER.items(), strict=False):
        _draw(axes, curves[title], size)
    for column, name in enumerate(steps):
        _draw(panels[1, column], {"training step": steps[name]}, SIZES[name])
        held = {kind: memory[f"{kind}, by {name}"] for kind in ("held", "temporaries")}
        _draw(panels[2, column], held, SIZES[name])
    _same_limits(panels[0, : len(LAYER)], "time of a layer", "s")
    _same_limits(panels[1, : len(steps)], "training step (tokens/s)")
    _same_limits(panels[2, : len(steps)], "memory of a device", "B")
    # the panels to the right of this legend are unused, so the layout need not make room for it
    style.legend_beside(panels[0, len(LAYER) - 1]).set_in_layout(len(LAYER) == columns)
    style.legend_beside(panels[2, len(steps) - 1])
    style.save(figure, file)


def _draw(axes: Axes, lines: Mapping[str, Points], size: str) -> None:
    looks = style.looks(list(lines))
    sizes: list[float] = []
    for label, points in lines.items():
        sizes = [float(point) for point in points]
        style.line(axes, sizes, list(points.values()), label, **looks[label], marker="o")
    axes.set(xlabel=size, xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{one:g}" for one in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _same_limits(row: Any, label: str, unit: str = "") -> None:
    """Gives the panels of a row the same limits, and only the first one tick labels."""
    limits = [axes.get_ylim() for axes in row]
    for axes in row:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        style.log_ticks(axes.yaxis, unit)
    for axes in row[1:]:
        axes.tick_params(axis="y", labelleft=False)
    row[0].set_ylabel(label)
