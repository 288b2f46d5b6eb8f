"""Tables of Text-to-LoRA: runs side by side, and conditions compared on tasks."""

from collections.abc import Sequence
from typing import Any

from moe_reduce.reports import tables
from moe_reduce.reports.summaries import Summary

LOSS, SHARES = "loss", {"accuracy": "next-token accuracy", "exact_match": "exact match", "rouge_l": "ROUGE-L"}


def of_runs(summaries: Sequence[Summary]) -> str:
    """One row for each run, as aligned text."""
    rows = [["run", "objective", "tasks", "parameters", "learning rate", "validation loss", "relative L1"]]
    for summary in summaries:
        validation = summary["validation"]
        rows.append(
            [
                summary["name"] or summary["objective"],
                summary["objective"],
                str(summary["tasks"]),
                f"{summary['parameters']:,}",
                f"{summary['learning_rate']:g}",
                f"{validation['loss']:.4f}",
                f"{validation['relative_l1']:.4f}" if "relative_l1" in validation else "-",
            ]
        )
    return tables.aligned(rows)


def of_conditions(conditions: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row for each condition: means over tasks."""
    shown = [name for name in SHARES if name in conditions[0]]
    rows = [["condition", "loss (nats)", *(SHARES[name] for name in shown)]]
    rows += [[found["name"], f"{found[LOSS]:.4f}", *(f"{found[name]:.1%}" for name in shown)] for found in conditions]
    return rows
