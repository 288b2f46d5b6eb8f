"""Fill the marked tables of a document from results or from the code, so that none is typed by hand."""

import re
from pathlib import Path
from typing import Any

from moe_reduce.core.disk import read_json
from moe_reduce.core.errors import UserError
from moe_reduce.reports import families_table, tables
from moe_reduce.reports.finished_runs import SUMMARY

MARKERS = re.compile(r"(<!-- results:(\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
FAMILIES = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)


def fill(document: Path, results: Path) -> str:
    """The document's text, with every marked table regenerated from results/NAME/summary.json, or from the families.

    Raises UserError when the document, one of its results, or every marker is missing.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{_markdown(_result(results / match[2]))}{match[3]}"

    if not document.is_file():
        raise UserError(f"--document={document} does not exist")
    text, count = MARKERS.subn(table, document.read_text())
    text, of_families = FAMILIES.subn(lambda match: f"{match[1]}{families_table.markdown()}{match[2]}", text)
    if count + of_families == 0:
        raise UserError(f"{document} has no markers for a table: write <!-- results:NAME --> and <!-- /results -->")
    return text


def _result(directory: Path) -> dict[str, Any]:
    file = directory / SUMMARY
    if not file.is_file():
        raise UserError(f"{directory} has no {SUMMARY}: make it with moe-reduce report --runs")
    return read_json(file)


def _markdown(result: dict[str, Any]) -> str:
    """The table of a result, below its title and the command that made it."""
    table = tables.markdown([result["columns"], *result["rows"]])
    return f"**{result['title']}** (`{result['command']}`)\n\n{table}"
