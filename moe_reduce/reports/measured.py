"""Finished runs as a result groups them: by the name of their model or variant, one run for each seed."""

from pathlib import Path
from typing import NamedTuple

from moe_reduce.reports.figures import Summary

SUMMARY = "summary.json"


class Measured(NamedTuple):
    """One finished run: its name, the directory it was found in, and its summary."""

    name: str
    source: Path
    summary: Summary


Groups = dict[str, list[Measured]]
