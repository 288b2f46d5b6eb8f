"""Files that ask for endless work, and machines without memory: one line each, before anything large is made."""

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter_directory
from moe_reduce.commands import inspect
from moe_reduce.core import config_dict, json_files, memory
from moe_reduce.core.config import AdapterConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data import files
from moe_reduce.families import read_config
from moe_reduce.reduction import scores
from moe_reduce.storage import manifest

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        NESTED,
        "[" * 120 + "]" * 120,
        '{"a":' * 900 + "1" + "}" * 900,
        f'{{"model_type": "llama", "vocab_size": {DEEP}}}',
    ],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda file: read_config(file.parent)),
        ("manifest.json", lambda file: manifest.read(file.parent)),
        ("scores.json", scores.read),
        ("any.json", json_files.read_object),
        ("rows.jsonl", lambda file: [list(text) for text in files.read_documents(file, "text")]),
        ("adapter.json", lambda file: adapter_directory.described(file.parent)),
    ],
)
def test_json_nested_without_end(tmp_path, name, read, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="nested too deeply") as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b'{"a": ' + b"9" * 5000 + b"}", b"[1]", b"null"])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "any.json").write_bytes(content)
    with pytest.raises(UserError, match=r"any\.json .*JSON") as caught:
        json_files.read_object(tmp_path / "any.json", "make it again")
    assert str(caught.value).endswith("make it again")


def test_json_of_ordinary_depth_is_read():
    assert json_files.parse("[" * 60 + "]" * 60, "a.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["alpha", "dropout", "core_std"])
def test_numbers_that_are_not_finite(number, key):
    raw = config_dict.completed(AdapterConfig, json_files.parse(f'{{"{key}": {number}}}', "adapter.json"))
    with pytest.raises(UserError, match=f"config key adapter.{key} must be"):
        config_dict.build(AdapterConfig, raw, "adapter")


def test_no_json_is_parsed_past_the_one_place_that_limits_it():
    package = Path(inspect.__file__).parents[1]
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if "json.load" in file.read_text()}
    # the two others read what a library wrote, or has refused already
    assert found == {"core/json_files.py", "data/splitting.py", "data/library_reader.py"}


def test_a_damaged_depth_is_refused_by_the_command(tmp_path, capsys):
    raw = {"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "num_attention_heads": 4,
           "num_hidden_layers": 10**9, "intermediate_size": 40}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for command in (["inspect"], ["plan"]):
        assert main([*command, f"--model={tmp_path}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "num_hidden_layers" in line
        assert "1000000000" in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4.00 TiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 75497472 bytes."),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_a_command_without_memory_ends_in_a_line(monkeypatch, capsys, error):
    def run(*_):
        raise error

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "--model=anywhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moe-reduce inspect: out of memory")
    assert "ulimit -v" in line


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(errno.EIO, "broken disk"), ImportError("no x")])
def test_other_errors_keep_their_traceback(monkeypatch, error):
    def run(*_):
        raise error

    monkeypatch.setattr(inspect, "run", run)
    with pytest.raises(type(error)):
        main(["inspect", "--model=anywhere"])


def test_a_limit_that_leaves_no_room_for_weights(monkeypatch):
    used = int(memory.STATM.read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (used + memory.SPARE + 10**9, -1))
    memory.check_room(9 * 10**8, "Llama")
    with pytest.raises(UserError, match=r"Llama takes 1,100 MB and ulimit -v leaves"):
        memory.check_room(11 * 10**8, "Llama")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    memory.check_room(10**15, "Llama")
    memory.check_start()


def test_an_address_space_too_small_for_jax_ends_in_a_line():
    command = [sys.executable, "-m", "moe_reduce", "inspect", "--model=."]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 600000 && exec "$@"', "bash", *command],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "ulimit -v allows 614 MB" in line
