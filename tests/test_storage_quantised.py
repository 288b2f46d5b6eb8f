"""Quantised weights on disk: the same integers and scales back, onto a mesh as well, and no other program's model."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from quantised_models import quantise_int8

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import expressions, trees
from moe_reduce.core.config import ExecutionConfig, MeshConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.weights import Quantised
from moe_reduce.storage.tensors import SINGLE_FILE, TensorFiles
from moe_reduce.training import sharding

TOKENS_BT = np.arange(16, dtype=np.int32).reshape(4, 4)


@pytest.fixture(params=["tiny_dense", "tiny_neox", "tiny_shared", "tiny_layer_moe"])
def model(request: pytest.FixtureRequest) -> Model:
    config = request.getfixturevalue(request.param)
    return quantise_int8(Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu")))


@pytest.fixture
def dense(tmp_path: Path, tiny_dense: Any) -> Path:
    params = init_params(tiny_dense, jax.random.key(0))
    moe_reduce.save(quantise_int8(Model(tiny_dense, params, ExecutionConfig().resolve("cpu"))), tmp_path / "model")
    return tmp_path / "model"


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_the_same_integers_and_scales_come_back(model: Model, tmp_path: Path):
    moe_reduce.save(model, tmp_path / "model")
    loaded = moe_reduce.load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same_weights(loaded.params, model.params)
    assert any(isinstance(leaf, Quantised) for leaf in trees.flatten(loaded.params).values())
    raw = json.loads((tmp_path / "model/config.json").read_text())
    assert (raw["model_type"], raw["dtype"]) == ("moe_reduce", "float32")
    half = moe_reduce.load(tmp_path / "model", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in trees.flatten(half.params).values()} == {"int8", "bfloat16"}
    moe_reduce.save(loaded, tmp_path / "again")
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_each_device_reads_its_own_part(model: Model, tmp_path: Path):
    moe_reduce.save(model, tmp_path / "model")
    expert = 1 if model.config.moe is None else 2
    mesh = sharding.make_mesh(MeshConfig(data=4 // expert // 2, fsdp=2, expert=expert, tensor=2))
    placed = moe_reduce.load(tmp_path / "model", shardings=sharding.model_shardings(mesh, model.config))
    assert_same_weights(placed.params, model.params)
    query = placed.params["layers"]["attention"]["query"]
    assert {shard.data.shape[3] for shard in query.scales.addressable_shards} == {4}
    assert {shard.data.shape[2] for shard in query.scales.addressable_shards} == {2}  # half of the heads
    assert not query.codes.is_fully_replicated


def test_names_of_the_tensors(dense: Path):
    entries = TensorFiles(dense).entries
    query = "model.layers.1.self_attn.q_proj.weight"
    assert (entries[query].dtype, entries[query].shape) == (np.int8, (16, 16))
    assert (entries[f"{query}_scale"].dtype, entries[f"{query}_scale"].shape) == (np.float32, (16,))
    assert entries["model.norm.weight"].dtype == np.float32
    assert "model.norm.weight_scale" not in entries


Q = "model.layers.1.self_attn.q_proj.weight"
FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop(f"{Q}_scale"), f"no tensor {Q}_scale"),
        (lambda arrays: [arrays.pop(f"{name}_scale") for name in (Q, FIRST)], "not a floating-point weight"),
        (lambda arrays: arrays.update({f"{Q}_scale": arrays[f"{Q}_scale"][:3]}), f"{Q}_scale"),
        (lambda arrays: arrays.update({f"{Q}_scale": arrays[f"{Q}_scale"].astype(np.float16)}), "need float32"),
        (lambda arrays: arrays.update({Q: arrays[Q].astype(np.float32)}), "need int8"),
        (lambda arrays: arrays.update({"model.norm.weight_scale": np.ones(1, np.float32)}), "model.norm.weight_scale"),
    ],
)
def test_contradictions_are_refused_by_name(dense: Path, change: Any, words: str):
    arrays = safetensors.numpy.load_file(dense / SINGLE_FILE)
    change(arrays)
    safetensors.numpy.save_file(arrays, dense / SINGLE_FILE)
    with pytest.raises(UserError) as caught:
        moe_reduce.load(dense)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loaded_model_computes_as_before(model: Model, tmp_path: Path):
    moe_reduce.save(model, tmp_path / "model")
    np.testing.assert_array_equal(moe_reduce.load(tmp_path / "model")(TOKENS_BT), model(TOKENS_BT))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": 3}, "config_groups.group_0.targets must be a list"),
        ({"targets": ["Linear", None]}, "config_groups.group_0.targets must be a list"),
        ({"weights": "int8"}, "config_groups.group_0.weights must be an object"),
        ({"targets": ["re:("]}, "no regular expression"),
        ({"targets": [r"re:(\w|\w\w|\w\w\w|\.|\w\.)+[!?]"]}, "takes more than"),
    ],
)
def test_damaged_groups_of_compressed_tensors_are_one_line(
    tmp_path: Path, tiny_dense: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    params = init_params(tiny_dense, jax.random.key(0))
    moe_reduce.save(Model(tiny_dense, params, ExecutionConfig().resolve("cpu")), tmp_path / "model")
    arguments = [f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--scheme=int8"]
    assert main(["quantize", *arguments, "--format=compressed-tensors"]) == 0
    raw = json.loads((tmp_path / "out/config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"] |= change
    (tmp_path / "out/config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words) as caught:
        moe_reduce.load(tmp_path / "out")
    assert "\n" not in str(caught.value)
