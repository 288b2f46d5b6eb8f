"""The result of reductions: one row for each reduction, one column for each share of the experts kept."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.reports import ladder_picture
from moe_reduce.reports.finished_runs import Groups
from moe_reduce.reports.ladder_picture import ladder
from moe_reduce.reports.summaries import Summary, spread


def result(groups: Groups, title: str, out: Path) -> dict[str, Any]:
    """Rows of validation loss and share of accuracy kept, mean ± half of the range over seeds; draws curves.png.

    If a pruned model was then recovered, its row shows the recovered model. Shares of accuracy are relative to each
    run's first model. Two rows are comparable only if their first models have similar losses, which a column gives.
    """
    del title
    ladders = {name: [ladder(one.summary) for one in groups[name]] for name in sorted(groups)}
    shares = sorted({share for runs in ladders.values() for run in runs for share in run}, reverse=True)
    rows = []
    for name, runs in ladders.items():
        tokens = sum(stage["tokens"] for stage in groups[name][0].summary["stages"])
        firsts = [one.summary["stages"][0] for one in groups[name]]
        cells = [_cell([run[share] for run in runs if share in run], firsts) for share in shares]
        before = spread([first["validation"]["loss"] for first in firsts], ".3f")
        rows.append([name, f"{tokens / 1e6:.1f} M", str(len(runs)), before, *cells])
    sizes = [_sizes([run[share] for runs in ladders.values() for run in runs if share in run]) for share in shares]
    out.mkdir(parents=True, exist_ok=True)
    ladder_picture.picture(ladders, out / "curves.png")
    return {
        "columns": ["reduction", "training tokens", "seeds", "first model", *(f"{share} %" for share in shares)],
        "rows": [["parameters", "", "", "", *sizes], *rows],
        "runs": {name: [_without_expert_use(one.summary) for one in runs] for name, runs in groups.items()},
    }


def _sizes(stages: list[Summary]) -> str:
    """Parameter count, or its range if reductions differ: pools with a router for each layer have more."""
    counts = sorted({stage["parameters"] for stage in stages})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def _cell(stages: list[Summary], firsts: list[Summary]) -> str:
    if not stages:
        return ""
    kept = np.mean([stage["validation"]["accuracy"] for stage in stages])
    kept /= np.mean([first["validation"]["accuracy"] for first in firsts])
    return f"{spread([stage['validation']['loss'] for stage in stages], '.3f')} ({kept:.1%})"


def _without_expert_use(run: Summary) -> Summary:
    """The summary without the use of every expert in every layer, which only a run's own picture shows."""
    return run | {"stages": [{k: v for k, v in stage.items() if k != "expert_use"} for stage in run["stages"]]}
