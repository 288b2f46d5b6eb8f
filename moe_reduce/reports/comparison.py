"""Compare the models of finished runs: size, quality, speed, a picture, and continuations of one prompt."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_reduce.core.config import ExecutionConfig, GenerateConfig
from moe_reduce.core.disk import read_json
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.generate import ready
from moe_reduce.inference.text import Continuation, end_ids, stream
from moe_reduce.reports import style
from moe_reduce.reports.tables import aligned
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import load

SUMMARY = "summary.json"
COLUMNS = ["model", "parameters", "bytes (fp32)", "validation loss", "accuracy", "accuracy kept", "decoded tokens/s"]
TIMED = 3  # timed generations, after one that compiles; the speed is their median
LEAST_TOKENS = 8  # a shorter text says nothing about speed
PATH_COLOUR, OTHER_COLOUR = style.FAMILIES["pool"], style.FAMILIES["dense"]
NEAR = 0.08  # fraction of an axis within which two labels would touch


@dataclass(frozen=True)
class Entry:
    """One model of a finished run: its name, its directory, and what the run's summary says about it."""

    name: str
    directory: Path
    summary: dict[str, Any]
    reduced_from: str | None = None  # SHA-256 of the model that a reduction began with


def entries(workdirs: Sequence[Path]) -> list[Entry]:
    """All models of finished `train` and `reduce` workdirs, in order.

    Raises UserError when a run is not finished, two models have the same name, or validation texts differ.
    """
    found = [entry for workdir in workdirs for entry in _checked_entries(workdir)]
    names = [entry.name for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--runs have two models named {name!r}: leave one of the runs out")
    texts = {entry.summary["data"]["fingerprint"] for entry in found if "data" in entry.summary}
    if len(texts) > 1:
        raise UserError("--runs were validated on different texts, so their losses do not compare: leave one out")
    return found


def _checked_entries(workdir: Path) -> list[Entry]:
    """Entries with a name and every number that a row shows; UserError for a summary that was damaged."""
    try:
        found = _workdir_entries(workdir)
        for entry in found:
            summary, validation = entry.summary, entry.summary["validation"]
            numbers = [summary["parameters"], summary["bytes"], validation["loss"], validation["accuracy"]]
            texts = [entry.name, *([summary["data"]["fingerprint"]] if "data" in summary else [])]
            if not all(type(number) in (int, float) for number in numbers):
                raise ValueError(f"numbers are {numbers}")
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"names are {texts}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{workdir / SUMMARY} lacks what a finished run writes ({error!r}): restore it, or run it again"
        ) from error
    return found


def _workdir_entries(workdir: Path) -> list[Entry]:
    file = workdir / SUMMARY
    if not file.is_file():
        raise UserError(f"{workdir} has no {SUMMARY}: give the workdir of a finished run")
    summary = read_json(file)
    if "stages" in summary:
        return _reduction_entries(workdir, summary)
    if "runs" in summary:
        return [Entry(run["name"], workdir / run["name"] / "model", run) for run in summary["runs"]]
    if "validation" not in summary:
        raise UserError(f"{file} was not written by train or reduce: give the workdir of one of these")
    return [Entry(summary["name"] or workdir.name, workdir / "model", summary)]


def _reduction_entries(workdir: Path, summary: dict[str, Any]) -> list[Entry]:
    """Entries of the models after each stage; the unreduced model is an entry of the run that trained it."""
    first, *stages = summary["stages"]
    data = {"data": summary["data"]} if "data" in summary else {}
    return [
        Entry(stage["name"], workdir / f"{number:02d}-{stage['name']}" / "model", stage | data, first["model_sha256"])
        for number, stage in enumerate(stages, start=1)
    ]


def reduction_path(found: Sequence[Entry]) -> list[Entry]:
    """The model that was reduced, if it is among the entries, then the model after each stage of its reduction."""
    after = [entry for entry in found if entry.reduced_from is not None]
    start_hashes = {entry.reduced_from for entry in after}
    before = [
        entry
        for entry in found
        if entry.reduced_from is None and manifest.input_of(entry.directory).sha256 in start_hashes
    ]
    return before + after if len(before) == 1 else after


def rows(found: Sequence[Entry], speeds: dict[str, float | None]) -> list[list[str]]:
    """Cells of `COLUMNS` for each model; accuracy kept is relative to the unreduced model, or else to the first."""
    unreduced = (reduction_path(found) or found)[0].summary["validation"]["accuracy"]
    return [_row(entry, unreduced, speeds[entry.name]) for entry in found]


def _row(entry: Entry, unreduced: float, speed: float | None) -> list[str]:
    summary, validation = entry.summary, entry.summary["validation"]
    return [
        entry.name,
        f"{summary['parameters']:,}",
        f"{summary['bytes'] / 1e6:.2f} MB",
        f"{validation['loss']:.3f}",
        f"{validation['accuracy']:.1%}",
        f"{validation['accuracy'] / unreduced:.1%}" if unreduced else "-",
        "-" if speed is None else f"{speed:,.0f}",
    ]


def table(cells: Sequence[list[str]]) -> str:
    """Aligned lines for a terminal."""
    return aligned([["", *COLUMNS[1:]], *cells])


def continued(
    directory: Path, prompt: str, settings: GenerateConfig, execution: ExecutionConfig
) -> tuple[str, float | None]:
    """(continuation of the prompt, decoding speed in tokens/s); speed is None for a text too short to time."""
    tokenizer, model = load_tokenizer(directory), load(directory, execution=execution)
    settings = dataclasses.replace(settings, end_ids=end_ids(model, tokenizer))
    prepared, rates, row = ready(model), [], Continuation(tokenizer, tokenizer.encode_prompt(prompt))
    for _ in range(1 + TIMED):
        row = Continuation(tokenizer, row.prompt)
        times = []
        for _ in stream(prepared, [row], settings):
            times.append(time.perf_counter())
        rates.append((len(row.ids) - 1) / (times[-1] - times[0]))
    return row.text, statistics.median(rates[1:]) if len(row.ids) >= LEAST_TOKENS else None


def picture(found: Sequence[Entry], file: Path) -> None:
    """Validation loss against bytes: a labelled point for each model, and arrows along the reduction."""
    figure, [[axes]] = style.panels(size=(7.5, 4.8))
    places = {entry.name: (entry.summary["bytes"] / 1e6, entry.summary["validation"]["loss"]) for entry in found}
    path = [entry.name for entry in reduction_path(found)]
    for start, end in itertools.pairwise(path):
        arrow = {"arrowstyle": "-|>", "color": PATH_COLOUR, "shrinkA": 6, "shrinkB": 6, "linewidth": 1.2}
        axes.annotate("", places[end], places[start], arrowprops=arrow)
    for name, (x, y) in places.items():
        axes.plot([x], [y], "o", markersize=8, color=PATH_COLOUR if name in path else OTHER_COLOUR)
    axes.margins(0.18)
    axes.set(xlabel="weights (MB in fp32)", ylabel="validation loss (nats a token), lower is better")
    _label(axes, places, path)
    style.save(figure, file)


def _label(axes, places: dict[str, tuple[float, float]], path: Sequence[str]) -> None:
    """Write each name above its point, or below it if an arrow comes from above or another name is near."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    before = dict(zip(path[1:], path, strict=False))
    done: list[tuple[float, float]] = []
    for name, (x, y) in places.items():
        crowded = any(abs(x - a) < NEAR * (right - left) and abs(y - b) < NEAR * (high - low) for a, b in done)
        below = crowded or (name in before and places[before[name]][1] > y)
        offset, alignment = (-10, "top") if below else (10, "bottom")
        axes.annotate(
            name, (x, y), xytext=(0, offset), textcoords="offset points", ha="center", va=alignment, fontsize=style.FONT
        )
        done.append((x, y))
