"""Steps shared by the commands that run a configuration in a workdir: train, reduce and adapt."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moe_reduce.commands import config_file
from moe_reduce.core import disk
from moe_reduce.core.errors import UserError

T = TypeVar("T")
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # raised by a summary that was changed


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --config, --workdir, --variant, and the arguments of a run on several hosts.

    required: False for a command that also works without a configuration.
    """
    config_file.add_arguments(parser, required)
    shown = "directory of the run; the same command resumes it"
    parser.add_argument("--workdir", required=required, type=Path, help=shown)
    parser.add_argument("--variant", action="append", metavar="NAME", help="run this variant only; may be repeated")
    parser.add_argument(
        "--distributed", action="store_true", help="run on several hosts, found through TPU metadata or SLURM"
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="run on several hosts, with the first one at this address; needs --processes and --process",
    )
    parser.add_argument("--processes", type=int, help="number of processes, with --coordinator")
    parser.add_argument("--process", type=int, help="index of this process, from 0, with --coordinator")


def run_each(
    arguments: argparse.Namespace,
    overrides: list[str],
    reader: Callable[[dict[str, Any]], T],
    run_one: Callable[[T, Path, str], None],
    show: Callable[[dict[str, dict[str, Any]], Path], None],
) -> Path:
    """Runs the variants of a configuration one after the other; returns the path of summary.json.

    reader: builds a run from nested values. run_one: takes a run, its workdir and its name. show: prints and draws the
    summaries of all finished variants, by name; its second argument is the workdir.
    """
    workdir: Path = arguments.workdir
    _check_workdir(workdir)
    described = config_file.read(arguments.config, overrides, reader)
    runs = chosen(described, arguments.variant)
    if "" not in runs:
        _check_variants_fit(workdir)
    import jax

    _join_processes(arguments)
    from moe_reduce.runs.workdir import SUMMARY, writing
    from moe_reduce.training import checkpoints, processes

    checkpoints.quiet_failures()
    with processes.together():
        for name, run in runs.items():
            if name:
                print(f"== {name}", flush=True)
            run_one(run, workdir / name, name)
    if jax.process_index() == 0:
        files = {name: workdir / name / SUMMARY for name in described}
        done = {name: disk.read_json(file) for name, file in files.items() if file.exists()}
        with writing(workdir):
            _show(show, done, workdir)
            if "" not in runs:
                disk.write_json(workdir / SUMMARY, {"runs": list(done.values())})
    return workdir / SUMMARY


def _show(
    show: Callable[[dict[str, dict[str, Any]], Path], None], done: dict[str, dict[str, Any]], workdir: Path
) -> None:
    try:
        show(done, workdir)
    except DAMAGED as error:
        raise UserError(
            f"summary.json of {workdir} lacks what a run writes ({error!r}): remove it and run the same command again"
        ) from error


def _check_workdir(workdir: Path) -> None:
    if ":/" in str(workdir):
        raise UserError(f"--workdir={workdir} must be a directory: mount the bucket and give the mount point")


def _check_variants_fit(workdir: Path) -> None:
    """Raises UserError for the workdir of a single run, whose summary that of several variants would replace."""
    summary = workdir / "summary.json"
    if (workdir / "config.json").exists() or (summary.is_file() and "runs" not in disk.read_json(summary)):
        raise UserError(f"--workdir={workdir} belongs to a single run, not to several variants: choose another workdir")


def chosen(runs: dict[str, T], variants: list[str] | None) -> dict[str, T]:
    """The variants that --variant names, or all of them. Raises UserError for an unknown name."""
    unknown = sorted(set(variants or ()) - set(runs))
    if unknown:
        known = ", ".join(name for name in runs if name) or "this configuration has none"
        raise UserError(f"--variant={unknown[0]} is unknown; known: {known}")
    return {name: run for name, run in runs.items() if not variants or name in variants}


def _join_processes(arguments: argparse.Namespace) -> None:
    places = (arguments.coordinator, arguments.processes, arguments.process)
    given = [place is not None for place in places]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process belong together: give all three, or --distributed")
    if all(given) and not 0 <= arguments.process < arguments.processes:
        raise UserError(
            f"--process={arguments.process} must be from 0 to {arguments.processes - 1}, as --processes says"
        )
    if all(given) and not re.fullmatch(r".+:\d+", arguments.coordinator):
        raise UserError(f"--coordinator={arguments.coordinator} must be HOST:PORT")
    if arguments.distributed or all(given):
        from moe_reduce.training import processes

        processes.join(*places)
