"""moe-reduce adapt: train an adapter or the whole model, then merge it; or let a hypernetwork write the adapter."""

import argparse
from pathlib import Path
from typing import Any

from moe_reduce.commands import hypernetwork_arguments, model_arguments, run_arguments
from moe_reduce.core.config import AdaptConfig, adapt_from_dict
from moe_reduce.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    run_arguments.add_arguments(parser, required=False)
    hypernetwork_arguments.add_hypernetwork(parser)
    parser.add_argument("--model", type=Path, help="the base of --hypernetwork")
    parser.add_argument("--out", type=Path, help="directory of the adapter that --hypernetwork writes")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in --out")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json, or of the written adapter."""
    hypernetwork_arguments.check(arguments)
    if arguments.hypernetwork is not None:
        model_arguments.no_overrides(overrides)
        return _write(arguments)
    for name in ("config", "workdir"):
        if getattr(arguments, name) is None:
            raise UserError(
                f"--{name} is missing: give --config and --workdir to train, or --hypernetwork, --task, --model and "
                "--out to write an adapter"
            )
    for name in ("model", "out"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} belongs to --hypernetwork: a configuration says it as --config.{name}")
    return run_arguments.run_each(arguments, overrides, adapt_from_dict, _adapt, _show)


def _write(arguments: argparse.Namespace) -> Path:
    """Leaves the adapter of a description in --out."""
    import shutil

    from moe_reduce.adapters import adapter_directory
    from moe_reduce.core import outputs

    for name in ("config", "workdir", "variant"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is for training, and --hypernetwork trains nothing: leave it out")
    for name in ("model", "out"):
        if getattr(arguments, name) is None:
            raise UserError(f"--{name} is missing: --hypernetwork needs --model=BASE and --out=DIR")
    if len(arguments.task) != 1:
        raise UserError(f"there are {len(arguments.task)} --task, and --out holds one adapter: give one")
    inputs = (arguments.model, arguments.hypernetwork)
    outputs.check(arguments.out, adapter_directory.KIND, arguments.overwrite, inputs)
    (written,) = hypernetwork_arguments.written(arguments, arguments.model)
    with outputs.directory(arguments.out, adapter_directory.KIND, arguments.overwrite) as unfinished:
        shutil.copytree(written, unfinished, dirs_exist_ok=True)
    return arguments.out


def _adapt(config: AdaptConfig, workdir: Path, name: str) -> None:
    from moe_reduce.runs.adapt import adapt

    adapt(config, workdir, name)


def _show(summaries: dict[str, dict[str, Any]], workdir: Path) -> None:
    from moe_reduce.reports import adaptation_table, training_pictures

    print(adaptation_table.table(list(summaries.values())))
    training_pictures.loss_picture({name: workdir / name for name in summaries}, workdir / "loss.png")
