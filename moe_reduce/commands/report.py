"""moe-reduce report: collect finished runs into a result, or fill the tables of documents from results."""

import argparse
from pathlib import Path

from moe_reduce.commands import model_arguments
from moe_reduce.core import outputs
from moe_reduce.core.disk import write_text
from moe_reduce.core.errors import UserError

KIND = outputs.json_kind(
    "a result", "summary.json", ("title", "command", "columns", "rows", "runs"), ("curves.jsonl", "curves.png")
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--runs", nargs="+", type=Path, metavar="WORKDIR", help="workdirs of finished runs, or earlier results"
    )
    parser.add_argument("--title", help="title of the result's table")
    parser.add_argument("--made-by", help="the command that made the runs, shown above the table")
    parser.add_argument(
        "--document", nargs="+", type=Path, metavar="FILE.md", help="documents whose marked tables are filled"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results"),
        help="directory of all results, for --document (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if a document is out of date")
    model_arguments.add_out(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Collects runs or fills documents; returns the paths written."""
    model_arguments.no_overrides(overrides)
    from moe_reduce.reports import documents, finished_runs, results

    if bool(arguments.runs) == bool(arguments.document):
        raise UserError("give either --runs (to collect) or --document (to fill)")
    if arguments.runs:
        if not (arguments.out and arguments.title and arguments.made_by):
            raise UserError("--runs needs --out, --title and --made-by")
        model_arguments.check_out(arguments, KIND)
        with outputs.directory(arguments.out, KIND, arguments.overwrite) as unfinished:
            results.collect(arguments.runs, arguments.title, arguments.made_by, unfinished)
        return str(arguments.out / finished_runs.SUMMARY)
    for document in arguments.document:
        text = documents.fill(document, arguments.results)
        if arguments.check and text != document.read_text():
            raise UserError(f"{document} is out of date: run moe-reduce report --document={document}")
        if not arguments.check:
            write_text(document, text)
    return "\n".join(map(str, arguments.document))
