"""moe-reduce adapt: train an adapter or the whole model on a text or on completions, then merge it."""

import argparse
from pathlib import Path
from typing import Any

from moe_reduce.commands import run_arguments
from moe_reduce.core.config import AdaptConfig, adapt_from_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    run_arguments.add_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    return run_arguments.run_each(arguments, overrides, adapt_from_dict, _adapt, _show)


def _adapt(config: AdaptConfig, workdir: Path, name: str) -> None:
    from moe_reduce.runs.adapt import adapt

    adapt(config, workdir, name)


def _show(summaries: dict[str, dict[str, Any]], workdir: Path) -> None:
    from moe_reduce.reports import adaptation_table, training_pictures

    print(adaptation_table.table(list(summaries.values())))
    training_pictures.loss_picture({name: workdir / name for name in summaries}, workdir / "loss.png")
