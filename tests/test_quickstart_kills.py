"""The whole quick start, killed at moments spread over its run and started again, ends as an unbroken run does."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_reduce.reports.comparison import COLUMNS

ROOT = Path(__file__).parent.parent
TIMED = ("decoded tokens/s",)  # columns that differ between equal runs
STEPS = "metrics.jsonl"
# file below runs/quickstart, number of lines that it must have, and seconds to wait after that before the kill
MOMENTS = (
    (f"models/dense/{STEPS}", 8, 0.5),  # the dense model trains, and has one checkpoint
    (f"models/mixture/{STEPS}", 20, 0.2),  # the mixture trains, and has several
    ("reduced/*-pooled/summary.json", 1, 1.0),  # experts are scored
    (f"reduced/*-recovered/{STEPS}", 2, 0.2),  # the recovery, before its first checkpoint
    ("reduced/summary.json", 1, 4.0),  # the comparison
)


def checkout(directory: Path) -> Path:
    """A directory like a fresh clone that is installed already, with the packages that run this test."""
    directory.mkdir()
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, directory / name)
    for name in ("moe_reduce", "setup.py"):
        (directory / name).symlink_to(ROOT / name)
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (directory / ".venv" / "installed").touch()  # newer than setup.py, so nothing is installed
    return directory


@contextlib.contextmanager
def started(directory: Path, home: Path) -> Iterator[subprocess.Popen]:
    """The running script; at the end of the context, it and all of its processes are killed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    log = (directory / "log.txt").open("a")
    command = ["bash", str(directory / "launch" / "quickstart.sh")]
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finish(directory: Path, home: Path) -> dict:
    """Run the script to its end; summary.json of the comparison."""
    with started(directory, home) as process:
        assert process.wait() == 0, (directory / "log.txt").read_text()[-3000:]
    return json.loads((directory / "runs/quickstart/comparison/summary.json").read_text())


def kill_at(directory: Path, home: Path, file: str, lines: int, seconds: float) -> None:
    """Start the script, and kill it and all of its processes some seconds after a file has so many lines."""
    with started(directory, home) as process:
        while not has_lines(directory, file, lines):
            assert process.poll() is None, (directory / "log.txt").read_text()[-3000:]
            time.sleep(0.1)
        time.sleep(seconds)
        assert process.poll() is None, f"the script ended before it could be killed at {file}"


def has_lines(directory: Path, file: str, lines: int) -> bool:
    return any(len(found.read_bytes().splitlines()) >= lines for found in directory.glob(f"runs/quickstart/{file}"))


def table(summary: dict) -> list[dict]:
    rows = (dict(zip(COLUMNS, row, strict=True)) for row in summary["rows"])
    return [{column: cell for column, cell in row.items() if column not in TIMED} for row in rows]


def weights(directory: Path) -> dict[str, str]:
    """SHA-256 of the weights of every model."""
    runs = directory / "runs/quickstart"
    files = sorted(runs.rglob("*.safetensors"))
    return {str(file.relative_to(runs)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the script needs bash and process groups")
def test_five_kills_change_nothing_but_times(tmp_path):
    unbroken, broken = checkout(tmp_path / "unbroken"), checkout(tmp_path / "broken")
    expected = finish(unbroken, tmp_path)  # the same HOME, so that the second run finds what the first compiled
    for moment in MOMENTS:
        kill_at(broken, tmp_path, *moment)
    found = finish(broken, tmp_path)
    assert table(found) == table(expected)
    assert found["texts"] == expected["texts"]
    assert weights(broken) == weights(unbroken) != {}
