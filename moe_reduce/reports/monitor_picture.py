"""The picture of what a machine did while models answered."""

from collections.abc import Sequence
from pathlib import Path

from moe_reduce.inference.monitor import Sample
from moe_reduce.reports import drawing


def picture(runs: Sequence[tuple[str, Sequence[Sample]]], file: Path) -> None:
    """Each figure over time, a line a run; figures that no run has are left out."""
    names = [
        name for name in Sample._fields[1:] if any(getattr(one, name) is not None for _, run in runs for one in run)
    ]
    figure, panels = drawing.panels(len(names), 1, (8, 2.4 * len(names)))
    for axes, name in zip(panels[:, 0], names, strict=True):
        for label, run in runs:
            known = [(one.seconds, getattr(one, name)) for one in run if getattr(one, name) is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], marker=".", label=label)
        axes.set(ylabel=name.replace("_", " "), xlabel="seconds")
    panels[0, 0].legend(fontsize=8)
    drawing.save(figure, file)
