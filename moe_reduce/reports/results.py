"""Collect finished runs into a result: a directory with summary.json and pictures, from which documents take tables.

summary.json holds {"title", "command", "columns", "rows", …}, whichever command the runs are of.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_reduce.core.disk import read_json, write_json
from moe_reduce.core.errors import UserError
from moe_reduce.reports import adaptation_results, reduction_results, training_results
from moe_reduce.reports.finished_runs import SUMMARY, FinishedRun, Groups
from moe_reduce.reports.summaries import Summary, is_baseline


def collect(sources: Iterable[Path], title: str, command: str, out: Path) -> None:
    """Writes out/summary.json and the pictures of runs of one command: `train`, `reduce` or `adapt`.

    A source is the workdir of a run, the workdir of several variants (which stands for all of them), or an earlier
    result, so that runs from several days and machines can be combined. If two sources hold the same model and seed,
    the later source wins.
    """
    sources = list(sources)
    try:
        content = _content(sources, title, out)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        named = ", ".join(map(str, sources))
        raise UserError(
            f"a summary or curve of {named} lacks what a finished run writes ({error!r}): restore it, or run it again"
        ) from error
    write_json(out / SUMMARY, {"title": title, "command": command} | content)


def _content(sources: list[Path], title: str, out: Path) -> dict[str, Any]:
    found = {(one.name, one.summary["seed"]): one for source in sources for one in _finished_runs(source)}
    groups: Groups = {}
    # the baseline, if there is one, comes first: gaps are measured to it
    for one in sorted(found.values(), key=lambda one: not is_baseline(one.name, one.summary)):
        groups.setdefault(one.name, []).append(one)
    kinds = {_kind(one.summary) for one in found.values()}
    if len(kinds) > 1:
        raise UserError(f"--runs mixes runs of {' and of '.join(sorted(kinds))}: collect them separately")
    collectors = {"reduce": reduction_results, "adapt": adaptation_results, "train": training_results}
    return collectors[kinds.pop()].result(groups, title, out)


def _kind(summary: Summary) -> str:
    """The command that wrote the summary."""
    if "stages" in summary:
        return "reduce"
    return "adapt" if "trained_parameters" in summary else "train"


def _finished_runs(source: Path) -> list[FinishedRun]:
    file = source / SUMMARY
    summary: dict[str, Any] = read_json(file) if file.is_file() else {"runs": {}}
    if "runs" not in summary and "name" not in summary:
        raise UserError(f"{file} was not written by train, reduce or adapt: give their workdirs, or an earlier result")
    if "runs" not in summary:
        return [FinishedRun(summary["name"] or source.name, source, summary)]
    inner = sorted(path.parent for path in source.glob(f"*/{SUMMARY}"))
    if inner:  # variants may have run one by one, and then their own summaries are newer than the common one
        return [one for workdir in inner for one in _finished_runs(workdir)]
    if not summary["runs"]:
        raise UserError(f"{source} has no {SUMMARY}: give the workdirs of finished runs, or an earlier result")
    return [FinishedRun(name, source, run) for name, runs in summary["runs"].items() for run in runs]
