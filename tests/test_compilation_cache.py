"""Programs compiled by one process are reused by the next, and a bad cache directory or entry never stops a run."""

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from training_runs import token_data, write_config

from moe_reduce.core import compilation_cache

TRAIN = {"steps": 4, "checkpoint_every": 2, "batch_size": 8, "warmup_steps": 0, "evaluate_batches": 1}
MODEL = {"layers": 1}


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cached")
    return write_config(directory, token_data(directory), train=TRAIN, model=MODEL)


def train(configuration, workdir, cache):
    """`moe-reduce train` in a process of its own; (what it printed on stderr, its summary)."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-m", "moe_reduce", "train", f"--config={configuration}", f"--workdir={workdir}"],
        env=environment | {compilation_cache.VARIABLE: str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def first(configuration, tmp_path_factory):
    """A run with an empty cache: (cache, model file's bytes, summary)."""
    directory = tmp_path_factory.mktemp("first")
    errors, summary = train(configuration, directory / "run", directory / "cache")
    assert errors == ""
    return directory / "cache", (directory / "run/model/model.safetensors").read_bytes(), summary


def entries(cache):
    return {file.name: file.stat().st_mtime_ns for file in cache.glob("*-cache")}


def test_a_second_run_reuses_the_programs_and_is_bit_identical(configuration, first, tmp_path):
    cache, model, summary = first
    before = entries(cache)
    assert any("train_step" in name for name in before)
    errors, again = train(configuration, tmp_path / "run", cache)
    assert errors == ""
    assert entries(cache) == before
    assert again["compile_seconds"] < summary["compile_seconds"] / 2
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == model


def test_a_damaged_entry_is_one_warning_and_is_repaired(configuration, first, tmp_path):
    cache, model, _ = first
    (entry,) = [file for file in cache.glob("*-cache") if "train_step" in file.name]
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    errors, _ = train(configuration, tmp_path / "run", cache)
    (line,) = errors.splitlines()
    assert line.startswith("moe-reduce: warning: reading the compiled program")
    assert "train_step" in line
    assert entry.stat().st_size > len(whole) // 2
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_two_processes_at_once_share_an_empty_cache(configuration, first, tmp_path):
    _, model, _ = first
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(train, configuration, tmp_path / name, tmp_path / "cache") for name in ("one", "two")]
        assert [run.result()[0] for run in runs] == ["", ""]
    for name in ("one", "two"):
        assert (tmp_path / name / "model/model.safetensors").read_bytes() == model


@pytest.fixture
def settings(monkeypatch):
    """What the cache tells JAX, which looks as if it were not imported yet."""
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(compilation_cache, "_replace_failed_entries", print)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "")
    return lambda: os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_the_cache_is_in_the_users_cache_directory(monkeypatch, tmp_path, settings):
    monkeypatch.delenv(compilation_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.enable()
    assert settings() == str(tmp_path / "moe_reduce/jax")
    assert (tmp_path / "moe_reduce/jax").is_dir()
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.5"


@pytest.mark.parametrize(
    ("variable", "value"), [(compilation_cache.VARIABLE, "off"), ("JAX_COMPILATION_CACHE_DIR", "x")]
)
def test_it_can_be_turned_off_and_left_to_jax(monkeypatch, tmp_path, settings, variable, value):
    monkeypatch.delenv(compilation_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    compilation_cache.enable()
    assert settings() == (value if variable.startswith("JAX") else "")
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_directory_it_is_one_warning(monkeypatch, settings, capsys):
    monkeypatch.setenv(compilation_cache.VARIABLE, "~no-such-user/cache")
    compilation_cache.enable()
    assert settings() == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert "~no-such-user/cache" in line


def test_an_entry_whose_writing_was_killed_has_an_access_time(monkeypatch, tmp_path, settings):
    (tmp_path / "jit_f-1-cache").touch()
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path))
    compilation_cache.enable()
    assert (tmp_path / "jit_f-1-atime").exists()
    assert settings() == str(tmp_path)


def test_an_unusable_directory_is_one_warning(monkeypatch, tmp_path, settings, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path / "file/cache"))
    compilation_cache.enable()
    assert settings() == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot be kept in {tmp_path / 'file/cache'} (Not a directory)" in line
    assert compilation_cache.VARIABLE in line


def test_a_program_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    compilation_cache._replace_failed_entries(tmp_path)
    (tmp_path / "jit_f-1-cache").touch()
    said = "Error writing persistent compilation cache entry for 'jit_f': OSError: [Errno 28] No space left on device"
    warnings.showwarning(UserWarning(said), UserWarning, "compiler.py", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "jit_f" in line
    assert "No space left" in line
    assert line.endswith("it is not kept")
    assert list(tmp_path.iterdir()) == []
