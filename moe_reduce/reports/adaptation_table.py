"""The comparison that `adapt` prints: one column for each adaptation, one row for each metric."""

from collections.abc import Sequence

from moe_reduce.reports import tables
from moe_reduce.reports.summaries import Summary, baseline


def table(summaries: Sequence[Summary]) -> str:
    """Aligned text; step times are relative to the baseline's."""
    first = baseline(summaries)
    measured = sorted({name for summary in summaries for name in summary["measured"]})
    names = ["", "trained parameters", "share of all", "optimiser state", "learning rate", "validation loss (nats)"]
    names += ["validation perplexity", "test perplexity", *measured, f"time of a step, {_name(first)} = 1"]
    columns = [_column(summary, first, measured) for summary in summaries]
    return tables.aligned(tables.transposed([names, *columns]))


def _column(run: Summary, first: Summary, measured: Sequence[str]) -> list[str]:
    return [
        _name(run),
        f"{run['trained_parameters']:,}",
        f"{run['trained_share']:.3%}",
        f"{run['optimizer_bytes'] / 1e6:,.3f} MB",
        f"{run['learning_rate']:g}",
        f"{run['validation']['loss']:.4f}",
        f"{run['validation']['perplexity']:.2f}",
        f"{run['test']['perplexity']:.2f}" if run.get("test") else "-",
        *(f"{run['measured'][name]:.1%}" if name in run["measured"] else "-" for name in measured),
        _relative_time(first, run),
    ]


def _name(run: Summary) -> str:
    return run["name"] or run["method"]


def _relative_time(first: Summary, other: Summary) -> str:
    speeds = first["tokens_per_second"], other["tokens_per_second"]
    return f"{speeds[0] / speeds[1]:.2f}" if all(speeds) else "-"
