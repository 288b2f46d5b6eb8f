"""The picture of a machine's load while models answered: each quantity over time, and bars by model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from moe_reduce.inference.monitor import Measured
from moe_reduce.reports import style

LABELS = {
    "cpu_percent": "CPU (%)",
    "ram_percent": "RAM (%)",
    "gpu_percent": "GPU (%)",
    "vram_mb": "GPU memory (MB)",
}
# panels of grouped bars: the axis, and the label of each column of the table that is a bar in each group
BARS = {
    "percent": {
        "peak_cpu_percent": "peak CPU",
        "peak_ram_percent": "peak RAM",
        "peak_gpu_percent": "peak GPU",
        "share_on_gpu_percent": "share of the model on the GPU",
    },
    "MB": {"peak_vram_mb": "peak GPU memory"},
    "tokens per second": {
        "prompt_tokens_per_second": "reading the prompt",
        "decode_tokens_per_second": "decoding",
    },
}
LINE_HEIGHT, GROUP_HEIGHT = 2.6, 0.5  # inches of a panel over time, and of a model among bars


def picture(measured: Sequence[Measured], file: Path) -> None:
    """Draws each quantity over time, a line for each model, and bars by model; what was not measured is left out."""
    runs = {found.row["name"]: found.samples for found in measured if found.samples}
    known = [name for name in LABELS if any(getattr(one, name) is not None for run in runs.values() for one in run)]
    lines = [(name, group) for name in known for group in style.charts(list(runs))]
    bars = [unit for unit, columns in BARS.items() if any(_known(found, one) for found in measured for one in columns)]
    heights = [LINE_HEIGHT] * len(lines) + [1.3 + GROUP_HEIGHT * len(measured)] * len(bars)
    figure, panels = style.panels(len(heights), 1, (9, sum(heights)), heights)
    for axes, (name, group) in zip(panels[: len(lines), 0], lines, strict=True):
        _over_time(axes, name, {label: runs[label] for label in group})
    for axes, unit in zip(panels[len(lines) :, 0], bars, strict=True):
        _bars(axes, unit, measured)
    style.save(figure, file)


def _over_time(axes: Axes, name: str, runs: dict[str, Any]) -> None:
    for number, (label, run) in enumerate(runs.items()):
        known = [(one.seconds, getattr(one, name)) for one in run if getattr(one, name) is not None]
        seconds, values = [second for second, _ in known], [value for _, value in known]
        look = {"color": style.CYCLE[number], "linestyle": style.LINES[number]}
        style.line(axes, seconds, values, Path(label).name, marker=".", **look)
    axes.set(ylabel=LABELS[name], xlabel="time (seconds)")
    style.legend_beside(axes)


def _bars(axes: Axes, unit: str, measured: Sequence[Measured]) -> None:
    """A group of bars for each model, the first on top."""
    columns = {name: label for name, label in BARS[unit].items() if any(_known(found, name) for found in measured)}
    places, height = np.arange(len(measured)), 0.8 / len(columns)
    for number, (name, label) in enumerate(columns.items()):
        values = [found.row[name] if _known(found, name) else np.nan for found in measured]
        shifted = places - 0.4 + height * (number + 0.5)
        axes.barh(shifted, values, height, color=style.CYCLE[number], label=label)
    names = [Path(found.row["name"]).name + (" (failed)" if "failure" in found.row else "") for found in measured]
    axes.set_yticks(places, names)
    axes.set(xlabel=unit, ylim=(len(measured) - 0.5, -0.5))
    style.legend_beside(axes)


def _known(found: Measured, name: str) -> bool:
    return found.row.get(name) is not None and not np.isnan(found.row[name])
