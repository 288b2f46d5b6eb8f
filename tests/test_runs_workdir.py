"""A workdir belongs to one configuration; keys that cannot change the result may differ when a run resumes."""

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file
from training_runs import ONE_DEVICE, run_config, token_data, unmeasured_peak

from moe_reduce.core.config import ExecutionConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.runs import workdir as workdirs
from moe_reduce.runs.train import train
from moe_reduce.training import job


def _changed(run, key, value):
    """The run with the value of one key of a group changed."""
    group, name = key.split(".")
    return dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **{name: value})})


@pytest.fixture
def run(tmp_path):
    return run_config("dense", token_data(tmp_path))


@pytest.fixture
def begun(tmp_path, run):
    """A workdir in which the run has begun."""
    directory = tmp_path / "run"
    workdirs.claim(directory, run)
    (directory / "checkpoints").mkdir()
    return directory


FREE = {
    "train.log_every": 3, "train.evaluate_every": 3, "train.checkpoint_every": 3, "train.checkpoints_kept": 5,
    "data.workers": 7, "data.cache": "elsewhere", "mesh.fsdp": 2,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FREE.items())
def test_keys_that_cannot_change_the_result_may_change(begun, run, key, value):
    wanted = _changed(run, key, value)
    assert wanted != run
    workdirs.claim(begun, wanted)
    assert json.loads((begun / "config.json").read_text()) == to_dict(wanted)


def test_every_key_that_may_change_is_tried():
    tried = {key if key in workdirs.MAY_CHANGE else key.split(".")[0] for key in FREE}
    assert tried == set(workdirs.MAY_CHANGE) - {"tasks.cache"}, "that one belongs to text-to-lora"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 21), ("train.batch_size", 16), ("train.accumulation", 2), ("train.learning_rate", 0.5),
        ("train.seed", 1), ("train.evaluate_batches", 3), ("data.sequence_length", 16), ("data.max_documents", 9),
        ("execution.remat", "full"), ("balance.weight", 0.5), ("model.layers", 3),
    ],
)  # fmt: skip
def test_keys_that_change_the_result_are_refused_by_name(begun, run, key, value):
    before = (begun / "config.json").read_text()
    with pytest.raises(UserError, match=rf"belongs to another configuration \({key} is .* there and {value!r} here"):
        workdirs.claim(begun, _changed(_changed(run, key, value), "train.log_every", 3))
    assert (begun / "config.json").read_text() == before


@pytest.mark.parametrize("content", ["null", "[]", "3", "{"])
def test_a_damaged_configuration_is_one_line(begun, run, content):
    (begun / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be used \(.*\): choose another one") as raised:
        workdirs.claim(begun, run)
    assert "\n" not in str(raised.value)


def test_a_run_that_resumes_with_other_intervals_ends_in_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)
    first = run_config("shared", token_data(tmp_path), ONE_DEVICE, steps=6, checkpoint_every=2, evaluate_every=2)
    first = dataclasses.replace(first, execution=ExecutionConfig(platform="cpu", dispatch="reference"))
    whole = train(first, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("checkpoints/6", "model"):
        shutil.rmtree(tmp_path / "stopped" / name)
    (tmp_path / "stopped/summary.json").unlink()
    wanted = first
    for key, value in FREE.items():
        wanted = wanted if key.startswith(("mesh", "data")) else _changed(wanted, key, value)
    resumed = train(wanted, tmp_path / "stopped")
    assert resumed["validation"] == whole["validation"]
    assert sorted(int(path.name) for path in (tmp_path / "stopped/checkpoints").iterdir()) == [4, 6]
    left, right = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped"))
    assert left.keys() == right.keys()
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)
