"""Results that a killed --overwrite moved aside, on disks that cannot exchange two names: readers find them."""

import errno
import json
import os
from pathlib import Path

import jax
import pytest
from training_runs import MODELS

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.commands.adapter_arguments import check_adapters
from moe_reduce.core import disk
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model

DEAD = 2**22 + 1  # beyond the largest process id
ASIDE = (".out.replaced", f".out.elsewhere.{DEAD}.old")


@pytest.fixture
def model(tmp_path) -> Path:
    config = MODELS["dense"]
    moe_reduce.save(Model(config, init_params(config, jax.random.key(0)), ExecutionConfig()), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("aside", ASIDE)
def test_a_model_is_read_under_its_name(model, capsys, aside):
    assert main(["inspect", f"--model={model}", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")
    model.rename(model.with_name(aside))
    assert main(["inspect", f"--model={model}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.rpartition("}")[0] + "}") == expected
    assert [path.name for path in model.parent.iterdir()] == ["out"]
    model.rename(model.with_name(aside))
    assert moe_reduce.load(model).config == MODELS["dense"]


def test_an_adapter_is_found_under_its_name(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    check_adapters([str(tmp_path / "out")])
    assert (tmp_path / "out").is_dir()


def test_what_exists_or_never_did_stays_as_it_is(model):
    other = model.with_name(".out.replaced")
    other.mkdir()
    (other / "older").touch()
    assert disk.restored(model) == model
    assert (model / "manifest.json").is_file()
    assert other.is_dir()
    assert not disk.restored(model.with_name("never")).exists()


def test_a_reader_that_may_not_rename_says_how(model, monkeypatch, capsys):
    model.rename(model.with_name(".out.replaced"))

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="killed --overwrite"):
        disk.restored(model)
    assert main(["inspect", f"--model={model}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"mv {model.with_name('.out.replaced')} {model}" in line
