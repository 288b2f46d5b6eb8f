"""The table that `reduce` prints: one row for each stage of each reduction."""

from collections.abc import Mapping

from moe_reduce.reports import tables
from moe_reduce.reports.summaries import Summary

COLUMNS = ("", "experts", "parameters", "loss", "gap", "accuracy", "tokens")


def table(summaries: Mapping[str, Summary]) -> str:
    """Aligned text; gaps are to the validation loss of the model that the reduction began with."""
    rows = [list(COLUMNS)]
    for name, summary in summaries.items():
        first = summary["stages"][0]["validation"]["loss"]
        rows += [[f"{name} {stage['name']}".strip(), *_cells(stage, first)] for stage in summary["stages"]]
    return tables.aligned(rows)


def _cells(stage: Summary, first: float) -> list[str]:
    validation = stage["validation"]
    return [
        f"{stage['experts']:,}",
        f"{stage['parameters']:,}",
        f"{validation['loss']:.4f}",
        f"{validation['loss'] - first:+.4f}",
        f"{validation['accuracy']:.2%}",
        f"{stage['tokens']:,}",
    ]
