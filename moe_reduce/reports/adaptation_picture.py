"""The learning curves of adaptations, one line for each method and size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_reduce.reports import style


def picture(curves: Mapping[str, Sequence[Sequence[float]]], title: str, recalled: bool, file: Path) -> None:
    """Draws recall of learned pairs (`recalled`) or validation loss against steps.

    curves: [step, value] at each evaluation, by method and number of trained parameters, in the order of the table.
    """
    figure, [[axes]] = style.panels(size=(9, 4.8))
    looks = style.looks(list(curves))
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        shown = [100 * value for value in values] if recalled else values
        style.line(axes, steps, shown, name, **looks[name], marker="o")
    axes.set(xlabel="step", ylabel="recall of learned pairs (%)" if recalled else "validation loss (nats a token)")
    axes.set_title(title, fontsize=style.FONT - 1)
    style.label_ends(axes)
    style.save(figure, file)
