"""moe-reduce train: pretrain the model of a configuration, or several side by side, and print the comparison."""

import argparse
from pathlib import Path

from moe_reduce.commands import config_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    config_file.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="where the run lives; the same again resumes it")
    parser.add_argument("--distributed", action="store_true", help="several hosts, found through TPU metadata or SLURM")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts, by address; needs the next two")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    runs = config_file.read(arguments.config, overrides)
    import jax

    if arguments.distributed or arguments.coordinator:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    from moe_reduce.training import comparison
    from moe_reduce.training.run import SUMMARY, train, write_json

    workdirs = {name: arguments.workdir / name if name else arguments.workdir for name in runs}
    summaries = []
    for name, config in runs.items():
        if name:
            print(f"== {name}", flush=True)
        summaries.append(train(config, workdirs[name], name))
    print(comparison.table(summaries))
    if jax.process_index() == 0:
        comparison.plot(workdirs, arguments.workdir / "loss.png")
        if "" not in runs:
            write_json(arguments.workdir / SUMMARY, {"runs": summaries})
    return arguments.workdir / SUMMARY
