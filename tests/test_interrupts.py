"""Ctrl-C: one line that says how to go on, and exit status 130."""

import importlib
import os
import signal
import subprocess
import time

import pytest
from training_runs import command, environment, token_data, write_config

from moe_reduce.__main__ import COMMANDS, main

RESUMED = ("train", "reduce", "adapt", "text-to-lora")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_in_one_line(monkeypatch, capsys, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    module = importlib.import_module(f"moe_reduce.commands.{name.replace('-', '_')}")
    monkeypatch.setattr(module, "run", interrupted)
    monkeypatch.setattr(module, "add_arguments", lambda _: None)
    assert main([name]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"moe-reduce {name}: interrupted: run the same command again" + " to go on" * (name in RESUMED)


def test_a_training_run_is_interrupted_and_goes_on(tmp_path):
    changes = {"train": {"checkpoint_every": 5, "steps": 10**6}, "execution": {"dispatch": "reference"}}
    file, work = write_config(tmp_path, token_data(tmp_path), **changes), tmp_path / "run"
    started = command(f"--config={file}", f"--workdir={work}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do children
    run = subprocess.Popen(
        started, env=environment(devices=1, cache=None), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while run.poll() is None and not (work / "checkpoints/10").exists():
            time.sleep(0.1)
        os.kill(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "moe-reduce train: interrupted: run the same command again to go on"
    assert "Traceback" not in errors
    assert not (work / "summary.json").exists()
    steps = [int(path.name) for path in (work / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps
    assert max(steps) >= 10
