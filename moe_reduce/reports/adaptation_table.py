"""Adaptations side by side."""

from typing import Any

from moe_reduce.reports.run_table import align, baseline


def table(summaries: list[dict[str, Any]]) -> str:
    """One column an adaptation, one row a figure; times are set against the baseline's."""
    first = baseline(summaries)
    measured = sorted({name for summary in summaries for name in summary["measured"]})
    rows = [
        ("", [summary["name"] or summary["method"] for summary in summaries]),
        ("trained parameters", [f"{summary['trained_parameters']:,}" for summary in summaries]),
        ("share of all", [f"{summary['trained_share']:.3%}" for summary in summaries]),
        ("optimiser state", [f"{summary['optimizer_bytes'] / 1e6:,.3f} MB" for summary in summaries]),
        ("learning rate", [f"{summary['learning_rate']:g}" for summary in summaries]),
        ("validation loss (nats)", [f"{summary['validation']['loss']:.4f}" for summary in summaries]),
        ("validation perplexity", [f"{summary['validation']['perplexity']:.2f}" for summary in summaries]),
        ("test perplexity", [_test(summary) for summary in summaries]),
        *((name, [_share(summary["measured"], name) for summary in summaries]) for name in measured),
        (f"time of a step, {first['name'] or first['method']} = 1", [_ratio(first, summary) for summary in summaries]),
    ]
    return align(rows)


def _test(summary: dict[str, Any]) -> str:
    return f"{summary['test']['perplexity']:.2f}" if summary.get("test") else "-"


def _share(measured: dict[str, float], name: str) -> str:
    return f"{measured[name]:.1%}" if name in measured else "-"


def _ratio(first: dict[str, Any], other: dict[str, Any]) -> str:
    speeds = first["tokens_per_second"], other["tokens_per_second"]
    return f"{speeds[0] / speeds[1]:.2f}" if all(speeds) else "-"
