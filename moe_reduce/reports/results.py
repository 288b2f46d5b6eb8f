"""Collect finished runs into a result: a directory with summary.json and pictures, from which documents take tables.

summary.json holds {"title", "command", "columns", "rows", …}, whatever made the result.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_reduce.core.disk import read_json, write_json
from moe_reduce.core.errors import UserError
from moe_reduce.reports import adaptation_results, reduction_results, training_results
from moe_reduce.reports.figures import Summary, is_baseline
from moe_reduce.reports.measured import SUMMARY, Groups, Measured


def collect(sources: Iterable[Path], title: str, command: str, out: Path) -> None:
    """Writes out/summary.json and the pictures of runs of one command: `train`, `reduce` or `adapt`.

    A source is the workdir of a run, the workdir of several variants (which stands for all of them), or an earlier
    result, so that seeds from several days and machines come together. When a model and seed come twice, the later
    source wins.
    """
    found = {(one.name, one.summary["seed"]): one for source in sources for one in _measured(source)}
    groups: Groups = {}
    # the baseline, if there is one, comes first: gaps are measured to it
    for one in sorted(found.values(), key=lambda one: not is_baseline(one.name, one.summary)):
        groups.setdefault(one.name, []).append(one)
    kinds = {_kind(one.summary) for one in found.values()}
    if len(kinds) > 1:
        raise UserError(f"--runs mixes runs of {' and of '.join(sorted(kinds))}: collect them apart")
    collectors = {"reduce": reduction_results, "adapt": adaptation_results, "train": training_results}
    content = collectors[kinds.pop()].result(groups, title, out)
    write_json(out / SUMMARY, {"title": title, "command": command} | content)


def _kind(summary: Summary) -> str:
    """The command that wrote the summary."""
    if "stages" in summary:
        return "reduce"
    return "adapt" if "trained_parameters" in summary else "train"


def _measured(source: Path) -> list[Measured]:
    file = source / SUMMARY
    own: dict[str, Any] = read_json(file) if file.is_file() else {"runs": {}}
    if "runs" not in own and "name" not in own:
        raise UserError(f"{file} is not of a run of train, reduce or adapt: give their workdirs, or an earlier result")
    if "runs" not in own:
        return [Measured(own["name"] or source.name, source, own)]
    inner = sorted(path.parent for path in source.glob(f"*/{SUMMARY}"))
    if inner:  # variants may have run one by one, so their own summaries are newer than the one of all
        return [one for workdir in inner for one in _measured(workdir)]
    if not own["runs"]:
        raise UserError(f"{source} has no {SUMMARY}: give the workdirs of finished runs, or an earlier result")
    return [Measured(name, source, run) for name, runs in own["runs"].items() for run in runs]
