"""moe-reduce train: pretrain the models of a configuration and compare them."""

import argparse
from pathlib import Path
from typing import Any

from moe_reduce.commands import run_arguments
from moe_reduce.core.config import RunConfig, run_from_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    run_arguments.add_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    return run_arguments.run_each(arguments, overrides, run_from_dict, _train, _show)


def _train(config: RunConfig, workdir: Path, name: str) -> None:
    from moe_reduce.runs.train import train

    train(config, workdir, name)


def _show(summaries: dict[str, dict[str, Any]], workdir: Path) -> None:
    from moe_reduce.reports import training_pictures, training_table

    print(training_table.table(list(summaries.values())))
    training_pictures.loss_picture({name: workdir / name for name in summaries}, workdir / "loss.png")
