"""The picture of a machine's load while models answered."""

from collections.abc import Sequence
from pathlib import Path

from moe_reduce.inference.monitor import Sample
from moe_reduce.reports import style

LABELS = {
    "cpu_percent": "CPU (%)",
    "ram_percent": "RAM (%)",
    "gpu_percent": "GPU (%)",
    "vram_mb": "GPU memory (MB)",
}


def picture(runs: Sequence[tuple[str, Sequence[Sample]]], file: Path) -> None:
    """Draws each quantity over time, one line for each model; a quantity that was not measured is left out."""
    names = [name for name in LABELS if any(getattr(one, name) is not None for _, run in runs for one in run)]
    figure, panels = style.panels(len(names), 1, (9, 2.6 * len(names)))
    for axes, name in zip(panels[:, 0], names, strict=True):
        for number, (label, run) in enumerate(runs):
            known = [(one.seconds, getattr(one, name)) for one in run if getattr(one, name) is not None]
            seconds, values = [second for second, _ in known], [value for _, value in known]
            place = number % len(style.CYCLE)
            look = {"color": style.CYCLE[place], "linestyle": style.LINES[place]}
            style.line(axes, seconds, values, Path(label).name, marker=".", **look)
        axes.set(ylabel=LABELS[name], xlabel="time (seconds)")
    style.legend_beside(panels[0, 0])
    style.save(figure, file)
