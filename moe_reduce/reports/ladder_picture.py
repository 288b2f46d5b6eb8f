"""The picture of several reductions: validation loss by share of experts kept, method and recovery."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from moe_reduce.reports import style
from moe_reduce.reports.summaries import Summary

Ladder = dict[int, Summary]  # the last stage at each share of the experts, in percent

# words in the name of a reduction -> the recovery that they stand for; without such words, routers are trained
RECOVERIES = {
    "no_recovery": "no recovery",
    "norms": "norms",
    "long": "experts, longer",
    "experts": "experts",
    "lora": "LoRA",
    "skema": "SkeMA",
}
ROUTERS = "routers"
LINES = {
    "no recovery": "-",
    ROUTERS: "-",
    "norms": "--",
    "experts": "-",
    "experts, longer": (0, (1, 1.2)),
    "LoRA": "--",
    "SkeMA": "-.",
}
PANELS = {
    "no recovery": ("no recovery",),
    "routers trained, or routers and norms": (ROUTERS, "norms"),
    "adapters or experts trained": ("experts", "experts, longer", "LoRA", "SkeMA"),
}
# words for variations of a method: among reductions that differ only in these, the best one is drawn
VARIATIONS = ("taught", "free", "reap")


def ladder(run: Summary) -> Ladder:
    """The last stage at each share of the experts, in percent."""
    first = run["stages"][0]["experts"]
    return {round(100 * stage["experts"] / first): stage for stage in run["stages"]}


def picture(ladders: Mapping[str, Sequence[Ladder]], file: Path) -> None:
    """Draws validation loss against the share of experts kept, with a panel for each kind of recovery.

    ladders: one for each seed, by name of the reduction. If no name states a recovery, there is one panel. Among
    reductions that differ only in VARIATIONS, only the one with the lowest final loss is drawn.
    """
    if not any(recovery(name) != ROUTERS for name in ladders):
        figure, [[axes]] = style.panels(size=(8.5, 4.8))
        _draw(axes, {name: (name, ROUTERS) for name in ladders}, ladders)
        style.label_ends(axes)
        style.save(figure, file)
        return
    drawn = _best_variations(ladders)
    titles = [title for title, kinds in PANELS.items() if any(kind in kinds for _, kind in drawn.values())]
    figure, panels = style.panels(1, len(titles), (6 * len(titles), 5))
    for axes, title in zip(panels[0], titles, strict=True):
        _draw(axes, {name: key for name, key in drawn.items() if key[1] in PANELS[title]}, ladders)
        axes.set_title(title)
    for axes in panels[0]:
        style.label_ends(axes)
    style.save(figure, file)


def recovery(name: str) -> str:
    """The recovery that the name of a reduction states; training routers if it states none."""
    return next((shown for word, shown in RECOVERIES.items() if f"_{word}_" in f"_{name}_"), ROUTERS)


def method(name: str) -> str:
    """The name of a reduction without the words for its recovery and its variations."""
    for word in (*RECOVERIES, *VARIATIONS):
        name = f"_{name}_".replace(f"_{word}_", "_").strip("_")
    return name


def _best_variations(ladders: Mapping[str, Sequence[Ladder]]) -> dict[str, tuple[str, str]]:
    """{name: (method, recovery)} of the lines to draw."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in ladders:
        kinds.setdefault((method(name), recovery(name)), []).append(name)
    return {min(names, key=lambda name: _means(ladders[name])[1][-1]): key for key, names in kinds.items()}


def _means(runs: Sequence[Ladder]) -> tuple[list[int], list[float]]:
    """(shares, mean validation loss over the seeds at each), from the largest share."""
    shares = sorted({share for run in runs for share in run}, reverse=True)
    return shares, [
        float(np.mean([run[share]["validation"]["loss"] for run in runs if share in run])) for share in shares
    ]


def _draw(axes: Axes, drawn: Mapping[str, tuple[str, str]], ladders: Mapping[str, Sequence[Ladder]]) -> None:
    """Draws at most eight lines, those with the lowest final loss."""
    means = {name: _means(ladders[name]) for name in drawn}
    shown = sorted(drawn, key=lambda name: means[name][1][-1])[: style.MOST_LINES]
    colours = style.colours([drawn[name][0] for name in shown])
    several = len({kind for _, kind in drawn.values()}) > 1
    for name in (name for name in drawn if name in shown):
        family, kind = drawn[name]
        shares, losses = means[name]
        label = (f"{family}, {kind}" if several else family).replace("_", " ")
        style.line(axes, shares, losses, label, color=colours[family], linestyle=LINES[kind], marker="o", markersize=4)
    axes.set(xlabel="experts kept (%)", ylabel="validation loss (nats a token)")
    axes.invert_xaxis()
