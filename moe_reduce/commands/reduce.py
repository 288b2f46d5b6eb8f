"""moe-reduce reduce: shrink a mixture of experts through the stages that a configuration lists."""

import argparse
from pathlib import Path
from typing import Any

from moe_reduce.commands import run_arguments
from moe_reduce.core.config import ReduceConfig, reduce_from_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    run_arguments.add_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    return run_arguments.run_each(arguments, overrides, reduce_from_dict, _reduce, _show)


def _reduce(config: ReduceConfig, workdir: Path, name: str) -> None:
    from moe_reduce.runs.reduce import reduce

    reduce(config, workdir, name)


def _show(summaries: dict[str, dict[str, Any]], workdir: Path) -> None:
    from moe_reduce.reports import ladder_picture, reduction_table

    print(reduction_table.table(summaries))
    if "" not in summaries:  # a single reduction has drawn its own picture
        ladders = {name: [ladder_picture.ladder(summary)] for name, summary in summaries.items()}
        ladder_picture.picture(ladders, workdir / "loss.png")
