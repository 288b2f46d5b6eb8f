"""moe-reduce text-to-lora: train oracle adapters of tasks, or a hypernetwork that writes adapters from descriptions."""

import argparse
from pathlib import Path
from typing import Any

from moe_reduce.commands import run_arguments
from moe_reduce.core.config import TextToLoraConfig, text_to_lora_from_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    run_arguments.add_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    return run_arguments.run_each(arguments, overrides, text_to_lora_from_dict, _train, _show)


def _train(config: TextToLoraConfig, workdir: Path, name: str) -> None:
    from moe_reduce.runs.text_to_lora.run import text_to_lora

    text_to_lora(config, workdir, name)


def _show(summaries: dict[str, dict[str, Any]], workdir: Path) -> None:
    from moe_reduce.reports import text_to_lora_table, training_pictures

    print(text_to_lora_table.of_runs(list(summaries.values())))
    training_pictures.loss_picture({name: workdir / name for name in summaries}, workdir / "loss.png")
