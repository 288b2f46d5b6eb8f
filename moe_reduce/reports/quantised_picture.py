"""The picture of quality against size: one point for each format of a model's weights."""

from collections.abc import Mapping
from pathlib import Path

from moe_reduce.reports import style


def picture(points: Mapping[str, tuple[float, float]], file: Path) -> None:
    """Draws perplexity over bytes, both logarithmic. points: {format: (bytes, perplexity)}."""
    figure, axes = style.panels(1, 1, (9, 5.5))
    plot = axes[0, 0]
    colours = style.colours([name.split(",")[0] for name in points])
    for name, (size, perplexity) in points.items():
        plot.plot(size, perplexity, "o", color=colours[name.split(",")[0]], label=name)
    plot.set(xlabel="bytes on disk", ylabel="perplexity (lower is better)", xscale="log", yscale="log")
    style.log_ticks(plot.xaxis, "B")
    style.log_ticks(plot.yaxis)
    style.label_ends(plot)
    style.save(figure, file)
