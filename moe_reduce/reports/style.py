"""The common look of all pictures: layout, colours, line styles, ticks, and labels that do not cover the data.

A picture is made in three steps: `panels` makes the axes, the caller draws at most eight lines in each, `save` writes
the PNG. Colours stand for a family of methods, line styles for how a model was recovered. pyplot is not used, because
its backend and its open figures belong to the program that imports this package, such as a notebook.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from moe_reduce.core.disk import replacing

MOST_LINES = 8  # in one chart: more cannot be told apart
FONT = 11  # points; readable when the picture is shown at half its size
GREY = "#707070"
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2.5)), (0, (8, 3)), (0, (3, 1, 1, 1)))
FAMILIES = {
    "dense": "#000000",
    "full": "#000000",
    "pool": "#0072B2",
    "shared_moe": "#0072B2",
    "pool_random_start": "#56B4E9",
    "layers": "#D55E00",
    "layers_frequency": "#E69F00",
    "layers_random": "#CC79A7",
    "lora": "#D55E00",
    "skema": "#009E73",
}
_LOOK: dict[Any, Any] = {
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def panels(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 5), heights: Sequence[float] | None = None
) -> tuple[Figure, np.ndarray]:
    """Returns (figure, its axes as an array of rows × columns).

    size: width and height in inches; heights: of the rows relative to each other, equal if not given.
    """
    with rc_context(_LOOK):
        figure = Figure(figsize=size, layout="constrained")
        return figure, np.asarray(figure.subplots(rows, columns, squeeze=False, height_ratios=heights))


def save(figure: Figure, file: Path) -> None:
    """Writes the figure as PNG, under a temporary name first, so that no half-written picture is left behind."""
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def colours(families: list[str]) -> dict[str, str]:
    """One colour for each family: the one in `FAMILIES`, or else the next unused colour."""
    unique = list(dict.fromkeys(families))
    fixed = {family: FAMILIES[family] for family in unique if family in FAMILIES}
    free = [colour for colour in CYCLE if colour not in fixed.values()]
    others = [family for family in unique if family not in fixed]
    return fixed | {family: free[number % len(free)] for number, family in enumerate(others)}


def family(name: str) -> str:
    """The longest name in `FAMILIES` that begins this name ("dense" for "dense_fast"), or else the name itself."""
    known = [one for one in FAMILIES if re.match(rf"{one}([_ ]|$)", name)]
    return max(known, key=len, default=name)


def looks(names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {color, linestyle}} for the lines of one chart; lines of one family differ in their line style."""
    families = [family(name) for name in names]
    colour = colours(families)
    numbers = [families[:place].count(one) for place, one in enumerate(families)]
    return {
        name: {"color": colour[one], "linestyle": LINES[number % len(LINES)]}
        for name, one, number in zip(names, families, numbers, strict=True)
    }


def charts(names: list[str], repeat_first: bool = False) -> list[list[str]]:
    """Splits names of lines, in order, into groups of similar size that a chart can hold.

    repeat_first: puts the first name into each group, for comparison.
    """
    if len(names) <= MOST_LINES:
        return [names]
    shared, others = (names[:1], names[1:]) if repeat_first else ([], names)
    count = -(-len(others) // (MOST_LINES - len(shared)))
    return [shared + part.tolist() for part in np.array_split(np.asarray(others, object), count)]


def line(axes: Axes, x: Any, y: Any, label: str | None = None, **look: Any) -> None:
    """Draws a line; a single point gets a marker, because a line of one point is invisible.

    look: options of matplotlib's `plot`, such as color and linestyle.
    """
    options: dict[str, Any] = ({"marker": "o"} if len(x) == 1 else {}) | look
    axes.plot(x, y, label=label, **options)


def label_ends(axes: Axes) -> None:
    """Writes the label of each line to the right of the axes, in its colour, level with its last point.

    Labels that would overlap are moved apart and joined to their lines by a thin stroke. Call it after drawing all
    lines of the figure, because labels are placed by the final limits of the axes.
    """
    lines = [one for one in axes.get_lines() if not str(one.get_label()).startswith("_")]
    if not lines:
        return
    figure: Any = axes.figure
    figure.draw_without_rendering()
    height = axes.get_window_extent().height * 72 / figure.dpi
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [tuple(to_axes.transform(np.asarray(one.get_xydata())[-1])) for one in lines]
    places = _moved_apart([end[1] for end in ends], 1.2 * FONT / height)
    for one, end, place in zip(lines, ends, places, strict=True):
        axes.annotate(
            str(one.get_label()), xy=end, xytext=(1.04, place), xycoords="axes fraction", textcoords="axes fraction",
            va="center", fontsize=FONT, color=one.get_color(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": one.get_color(), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def _moved_apart(places: list[float], gap: float) -> list[float]:
    """Positions in the same order, moved as little as possible to lie at least `gap` apart.

    places, gap: fractions of the height of the axes.
    """
    order = np.argsort(places, kind="stable")
    clusters: list[list[float]] = []  # (mean position, number) of labels that touch each other
    for index in order:
        clusters.append([places[index], 1])
        while len(clusters) > 1 and _bottom(clusters[-1], gap) - _top(clusters[-2], gap) < gap:
            centre, count = clusters.pop()
            below = clusters[-1]
            clusters[-1] = [(below[0] * below[1] + centre * count) / (below[1] + count), below[1] + count]
    spread = [_bottom(cluster, gap) + gap * step for cluster in clusters for step in range(int(cluster[1]))]
    found = dict(zip(order.tolist(), spread, strict=True))
    return [found[index] for index in range(len(places))]


def _bottom(cluster: list[float], gap: float) -> float:
    return cluster[0] - gap * (cluster[1] - 1) / 2


def _top(cluster: list[float], gap: float) -> float:
    return cluster[0] + gap * (cluster[1] - 1) / 2


def legend_beside(axes: Axes) -> Legend:
    """Puts the legend to the right of the axes, where it covers no data."""
    return axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=FONT)


def legend_above(axes: Axes) -> None:
    """Puts a legend of a few short labels above the axes, in one row."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=FONT)


def heat_map(axes: Axes, values: np.ndarray, unit: str) -> None:
    """Draws a matrix as colours, with a colour bar that names its unit."""
    figure: Any = axes.figure
    axes.grid(visible=False)
    image = axes.imshow(values, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=unit)


def log_ticks(axis: Axis, unit: str = "") -> None:
    """Labels a logarithmic axis at 1, 2 and 5 of each power of ten, few enough not to collide.

    unit: "B" or "s", for example, shown with prefixes (20 MB, 5 ms); "" for plain numbers.
    """
    low, high = axis.get_view_interval()
    subdivisions = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subdivisions, numticks=12))
    axis.set_major_formatter(EngFormatter(unit=unit) if unit else FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
