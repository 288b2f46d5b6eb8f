"""Killed and started again is the same as never killed, bit for bit; done is done; a workdir has one configuration."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from training_runs import command, environment, metrics, token_data, write_config

from moe_reduce.training.metrics import TIMING

STEPS = 40
TRAIN = {
    "steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup_steps": 2,
    "ema_decay": 0.9, "log_every": 3, "evaluate_every": 7, "evaluate_batches": 2, "checkpoint_every": 5,
}  # fmt: skip
SECONDS = 240


class Killed:
    """A run in `directory`: what it does until something is seen, then SIGKILL."""

    def __init__(self, directory: Path, file: Path):
        self.workdir = directory / "killed"
        self.arguments = command(f"--config={file}", f"--workdir={self.workdir}")
        self.environment = environment(devices=1, cache=directory / "compiled")

    def until(self, seen) -> None:
        """Starts the command and kills it as soon as seen() is true; fails if it ends before."""
        process = subprocess.Popen(
            self.arguments, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + SECONDS
            while not seen():
                assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[1]}"
                assert time.monotonic() < deadline
        finally:
            process.kill()
            _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert not (self.workdir / "summary.json").exists()
        assert len(metrics(self.workdir)) < STEPS // TRAIN["log_every"]

    def to_the_end(self) -> str:
        """Runs the command again, until it is done; returns what it printed."""
        done = subprocess.run(self.arguments, env=self.environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def saving(self) -> list[str]:
        """The checkpoints that are being written at this moment."""
        return [name for name in self.checkpoints() if not name.isdigit()]

    def steps(self) -> list[int]:
        """The whole checkpoints."""
        return sorted(int(name) for name in self.checkpoints() if name.isdigit())

    def checkpoints(self) -> list[str]:
        folder = self.workdir / "checkpoints"
        return os.listdir(folder) if folder.exists() else []


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed while it trains, then in the middle of a save, then left alone until it is done."""
    directory = tmp_path_factory.mktemp("kill")
    file = write_config(directory, token_data(directory), train=TRAIN, execution={"dispatch": "reference"})
    run = Killed(directory, file)
    run.until(lambda: max(run.steps(), default=0) >= 5 and len(metrics(run.workdir)) >= 3)
    trained = run.steps()
    for _ in range(3):  # a save is short: the process may have ended it between being seen and being killed
        before = set(run.saving())
        run.until(lambda before=before: set(run.saving()) - before and max(run.steps()) > max(trained))
        if run.saving():
            break
    assert run.saving(), "no save could be interrupted"
    run.interrupted = [trained, run.steps()]
    run.printed = run.to_the_end()
    return run


@pytest.fixture(scope="module")
def uninterrupted(killed):
    run = Killed(killed.workdir.parent, killed.workdir.parent / "config.py")
    run.workdir = killed.workdir.parent / "whole"
    run.arguments = [*run.arguments[:-1], f"--workdir={run.workdir}"]
    run.printed = run.to_the_end()
    return run


def untimed(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def test_the_kills_interrupted(killed):
    first, second = killed.interrupted
    assert 5 <= max(first) < max(second) < STEPS


def test_metrics_are_those_of_a_run_that_was_not_killed(killed, uninterrupted):
    expected = untimed(uninterrupted.workdir)
    assert [line["step"] for line in expected if line["split"] == "train"] == [*range(3, STEPS, 3), STEPS]
    assert [line["step"] for line in expected if line["split"] == "validation"] == [*range(7, STEPS, 7), STEPS]
    assert untimed(killed.workdir) == expected


def test_model_and_validation_are_bit_identical(killed, uninterrupted):
    ours, theirs = (run.workdir / "model/model.safetensors" for run in (killed, uninterrupted))
    assert len(load_file(ours)) > 10
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (json.loads((run.workdir / "summary.json").read_text()) for run in (killed, uninterrupted))
    for name in ("validation", "expert_use", "tokens", "parameters"):
        assert ours[name] == theirs[name], name


def test_nothing_half_made_is_left(killed):
    assert killed.steps() == [STEPS - 5, STEPS]
    assert killed.saving() == []
    assert not [path for path in killed.workdir.rglob("*") if ".tmp" in path.name or ".writing" in path.name]


def test_last_line_is_the_summary(killed):
    assert killed.printed.splitlines()[-1] == str(killed.workdir / "summary.json")
