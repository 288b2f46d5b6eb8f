"""moe-reduce compare: compare the models of finished runs in a table, a picture and continued text."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments
from moe_reduce.core import disk, outputs
from moe_reduce.core.generate_config import GenerateConfig

if TYPE_CHECKING:
    from moe_reduce.reports.comparison import Entry

PICTURE = "quality.png"
KIND = outputs.json_kind("a comparison", "summary.json", ("asked", "rows", "texts"), (PICTURE,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    default = GenerateConfig()
    parser.add_argument(
        "--runs", nargs="+", type=Path, required=True, metavar="WORKDIR", help="finished runs of train and reduce"
    )
    parser.add_argument("--prompt", required=True, help="text that every model continues")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of each text (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, help="0: always the most probable token (default: 0)"
    )
    parser.add_argument("--top-p", type=float, default=default.top_p, help="as in generate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--title", default="Models side by side", help="title of the table (default: %(default)s)")
    parser.add_argument(
        "--made-by",
        default="moe-reduce compare",
        help="command shown above tables (default: %(default)s)",
    )
    model_arguments.add_compute_dtype(parser)
    model_arguments.add_out(parser, required=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Prints the table and the texts; returns the path of summary.json. A finished comparison is only shown again."""
    model_arguments.no_overrides(overrides)
    from moe_reduce.reports import comparison

    _settings(arguments).check()
    model_arguments.check_utf8("--prompt", arguments.prompt)
    found = comparison.entries(arguments.runs)
    asked, file = _asked(arguments, found), arguments.out / comparison.SUMMARY
    summary = disk.read_json(file) if file.is_file() else {}
    if summary.get("asked") == asked and not arguments.overwrite:
        print(f"{arguments.out} is done: nothing to do (--overwrite makes it again)")
    else:
        model_arguments.check_out(arguments, KIND)
        summary = _compare(arguments, found) | {"asked": asked}
        _write(summary, found, arguments)
    _show(summary, comparison.reduction_path(found) or found)
    return str(file)


def _settings(arguments: argparse.Namespace) -> GenerateConfig:
    names = ("max_tokens", "temperature", "top_p", "seed")
    return GenerateConfig(**{name: getattr(arguments, name) for name in names})


def _asked(arguments: argparse.Namespace, found: list["Entry"]) -> dict[str, Any]:
    """All inputs of a comparison; a finished comparison with the same inputs is not repeated."""
    from moe_reduce.storage import manifest

    models = {entry.name: manifest.input_of(entry.directory).sha256 for entry in found}
    names = ("prompt", "max_tokens", "temperature", "top_p", "seed", "title", "made_by", "compute_dtype")
    return {"models": models} | {name: getattr(arguments, name) for name in names}


def _compare(arguments: argparse.Namespace, found: list["Entry"]) -> dict[str, Any]:
    from moe_reduce.reports import comparison

    execution, settings = model_arguments.execution(arguments), _settings(arguments)
    texts, speeds = {}, {}
    for entry in found:
        texts[entry.name], speeds[entry.name] = comparison.continued(
            entry.directory, arguments.prompt, settings, execution
        )
    return {
        "title": arguments.title,
        "command": arguments.made_by,
        "columns": comparison.COLUMNS,
        "rows": comparison.rows(found, speeds),
        "data": found[0].summary.get("data"),
        "prompt": arguments.prompt,
        "texts": texts,
        "decoded_tokens_per_second": speeds,
    }


def _write(summary: dict[str, Any], found: list["Entry"], arguments: argparse.Namespace) -> None:
    """Writes the picture and summary.json; the directory appears only when both are complete."""
    from moe_reduce.reports import comparison

    with outputs.directory(arguments.out, KIND, arguments.overwrite) as unfinished:
        comparison.picture(found, unfinished / PICTURE)
        disk.write_json(unfinished / comparison.SUMMARY, summary)


def _show(summary: dict[str, Any], shown: list["Entry"]) -> None:
    """The table, and the text of the first and the last model of the reduction."""
    from moe_reduce.reports import comparison

    print(f"\n{comparison.table(summary['rows'])}\n")
    for entry in dict.fromkeys((shown[0].name, shown[-1].name)):
        print(f"== {entry} continues the prompt\n{summary['prompt']}{summary['texts'][entry]}\n")
