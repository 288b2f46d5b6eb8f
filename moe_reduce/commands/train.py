"""moe-reduce train: pretrain the model of a configuration, or several side by side, and print the comparison."""

import argparse
import json
from pathlib import Path

from moe_reduce.commands import config_file, run_arguments
from moe_reduce.config import run_from_dict
from moe_reduce.disk import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    run_arguments.add_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    run_arguments.check_workdir(arguments.workdir)
    described = config_file.read(arguments.config, overrides, run_from_dict)
    runs = run_arguments.chosen(described, arguments.variant)
    import jax

    run_arguments.join_processes(arguments)
    from moe_reduce.training import checkpoints, comparison
    from moe_reduce.training.run import SUMMARY, train

    checkpoints.quiet_failures()
    for name, config in runs.items():
        if name:
            print(f"== {name}", flush=True)
        train(config, arguments.workdir / name, name)
    if jax.process_index() == 0:
        done = {name: arguments.workdir / name for name in described if (arguments.workdir / name / SUMMARY).exists()}
        summaries = [json.loads((workdir / SUMMARY).read_text()) for workdir in done.values()]
        print(comparison.table(summaries))
        comparison.plot(done, arguments.workdir / "loss.png")
        if "" not in runs:
            write_json(arguments.workdir / SUMMARY, {"runs": summaries})
    return arguments.workdir / SUMMARY
