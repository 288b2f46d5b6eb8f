"""moe-reduce train: pretrain the model of a configuration, or several side by side, and print the comparison."""

import argparse
import json
from pathlib import Path

from moe_reduce.commands import config_file
from moe_reduce.config import RunConfig
from moe_reduce.disk import write_json
from moe_reduce.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    config_file.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="where the run lives; the same again resumes it")
    parser.add_argument("--variant", action="append", metavar="NAME", help="only this variant; may be repeated")
    parser.add_argument("--distributed", action="store_true", help="several hosts, found through TPU metadata or SLURM")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts, by address; needs the next two")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Runs the command; returns the path of summary.json."""
    if ":/" in str(arguments.workdir):
        raise UserError(f"--workdir={arguments.workdir} must be on a disk: mount the bucket, and give its path")
    described = config_file.read(arguments.config, overrides)
    runs = _chosen(described, arguments.variant)
    import jax

    _join_processes(arguments)
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


def _join_processes(arguments: argparse.Namespace) -> None:
    import jax

    places = (arguments.coordinator, arguments.processes, arguments.process)
    given = [place is not None for place in places]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process belong together: give all three, or --distributed")
    if all(given) and not 0 <= arguments.process < arguments.processes:
        raise UserError(
            f"--process={arguments.process} must be from 0 to {arguments.processes - 1}, as --processes says"
        )
    if arguments.distributed or all(given):
        jax.distributed.initialize(*places)


def _chosen(runs: dict[str, RunConfig], variants: list[str] | None) -> dict[str, RunConfig]:
    unknown = sorted(set(variants or ()) - set(runs))
    if unknown:
        known = ", ".join(name for name in runs if name) or "this configuration has none"
        raise UserError(f"--variant={unknown[0]} is unknown; known: {known}")
    return {name: run for name, run in runs.items() if not variants or name in variants}
