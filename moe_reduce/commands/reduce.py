"""moe-reduce reduce: a mixture of experts made smaller, stage by stage, as a configuration says."""

import argparse
import json
from pathlib import Path

from moe_reduce.commands import config_file, run_arguments
from moe_reduce.config import reduce_from_dict
from moe_reduce.disk import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    run_arguments.add_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    run_arguments.check_workdir(arguments.workdir)
    described = config_file.read(arguments.config, overrides, reduce_from_dict)
    runs = run_arguments.chosen(described, arguments.variant)
    import jax

    run_arguments.join_processes(arguments)
    from moe_reduce.reduction import pictures
    from moe_reduce.reduction.run import check_directory, reduce, table
    from moe_reduce.training import checkpoints
    from moe_reduce.training.run import SUMMARY

    checkpoints.quiet_failures()
    for config in runs.values():
        check_directory(config.model)
    for name, config in runs.items():
        if name:
            print(f"== {name}", flush=True)
        reduce(config, arguments.workdir / name, name)
    if jax.process_index() == 0:
        done = [name for name in described if (arguments.workdir / name / SUMMARY).exists()]
        summaries = {name: json.loads((arguments.workdir / name / SUMMARY).read_text()) for name in done}
        print(table(summaries))
        if "" not in runs:
            pictures.ladder_picture(summaries, arguments.workdir / "loss.png")
            write_json(arguments.workdir / SUMMARY, {"runs": list(summaries.values())})
    return arguments.workdir / SUMMARY
