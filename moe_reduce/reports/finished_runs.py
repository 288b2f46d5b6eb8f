"""Finished runs grouped by the name of their model or variant, with one run for each seed."""

from pathlib import Path
from typing import NamedTuple

from moe_reduce.reports.summaries import Summary

SUMMARY = "summary.json"


class FinishedRun(NamedTuple):
    """One finished run: its name, the directory it was found in, and its summary."""

    name: str
    source: Path
    summary: Summary


Groups = dict[str, list[FinishedRun]]
