"""What the commands share that run a configuration in a workdir: train and reduce."""

import argparse
from pathlib import Path
from typing import TypeVar

from moe_reduce.commands import config_file
from moe_reduce.errors import UserError

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --workdir, --variant, and the processes of a run on several hosts."""
    config_file.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="where the run lives; the same again resumes it")
    parser.add_argument("--variant", action="append", metavar="NAME", help="only this variant; may be repeated")
    parser.add_argument("--distributed", action="store_true", help="several hosts, found through TPU metadata or SLURM")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts, by address; needs the next two")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process")


def check_workdir(workdir: Path) -> None:
    """Raises UserError for an address that is no path."""
    if ":/" in str(workdir):
        raise UserError(f"--workdir={workdir} must be on a disk: mount the bucket, and give its path")


def chosen(runs: dict[str, T], variants: list[str] | None) -> dict[str, T]:
    """The runs that --variant names, or all; raises UserError when one is unknown."""
    unknown = sorted(set(variants or ()) - set(runs))
    if unknown:
        known = ", ".join(name for name in runs if name) or "this configuration has none"
        raise UserError(f"--variant={unknown[0]} is unknown; known: {known}")
    return {name: run for name, run in runs.items() if not variants or name in variants}


def join_processes(arguments: argparse.Namespace) -> None:
    """Connects the processes of a run on several hosts; raises UserError when they are half named."""
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
