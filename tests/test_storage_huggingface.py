"""Round trips through Hugging Face directories, bit for bit, and every way a directory can contradict itself."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers_models import CLASSES, tensors_by_name, tiny, written

import moe_reduce
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, MeshConfig, ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import abstract_params
from moe_reduce.storage.parameter_tensors import check_names, read_params, write_items
from moe_reduce.storage.tensors import INDEX_FILE, SINGLE_FILE, TensorFiles, write_tensors
from moe_reduce.training import sharding

KINDS = [(kind, tied) for kind in CLASSES for tied in (True, False)]
POOL = MoEConfig(experts=12, active=2, width=20, placement="shared")
SIZES = {"vocab_size": 61, "layers": 4, "width": 24, "query_heads": 4, "key_value_heads": 2, "head_width": 8}
OWN = {
    "shared-factorised": ModelConfig(**SIZES, embedding_factor=6, moe=dataclasses.replace(POOL, router="shared")),
    "pool-with-biases": ModelConfig(
        **SIZES,
        qk_norm=True,
        tied_embeddings=False,
        moe=dataclasses.replace(
            POOL, selection_bias=True, score_offset=True, output_gain=True, score_function="sigmoid"
        ),
    ),
    "layers-with-gain": ModelConfig(**SIZES, moe=dataclasses.replace(POOL, placement="layer", output_gain=True)),
    "dense-factorised": ModelConfig(**SIZES, embedding_factor=6, feed_forward_width=40),
    "grouped-neox": ModelConfig(
        **SIZES, feed_forward_width=40, norm="layer", biases=True, parallel_residual=True, feed_forward="gelu",
        rotary_share=0.5,
    ),
    "biased-swiglu": ModelConfig(**SIZES, feed_forward_width=40, biases=True, tied_embeddings=False),
}  # fmt: skip
NEOX = ModelConfig(
    vocab_size=60, layers=4, width=32, query_heads=4, key_value_heads=4, head_width=8, feed_forward_width=40,
    tied_embeddings=False, norm="layer", biases=True, parallel_residual=True, feed_forward="gelu", rotary_share=0.5,
)  # fmt: skip


def random_params(config: ModelConfig, dtype: Any = np.float32) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return trees.map_with_path(lambda _, leaf: generator.normal(size=leaf.shape).astype(dtype), abstract_params(config))


def model_of(config: ModelConfig, params: dict[str, Any]) -> moe_reduce.Model:
    return moe_reduce.Model(config, params, ExecutionConfig().resolve("cpu"))


def assert_same_tensors(left: Path, right: Path) -> None:
    ours, theirs = TensorFiles(left), TensorFiles(right)
    assert set(ours.entries) == set(theirs.entries)
    for name in ours.entries:
        a, b = ours.read(name), theirs.read(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


def assert_same_params(left: dict[str, Any], right: dict[str, Any]) -> None:
    ours, theirs = trees.flatten(left), trees.flatten(right)
    assert set(ours) == set(theirs)
    for path in ours:
        a, b = np.asarray(ours[path]), np.asarray(theirs[path])
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("shard", ["50GB", "8KB"])
def test_load_then_save_is_the_same_directory(tmp_path: Path, kind: str, tied: bool, shard: str):
    written(tmp_path / "theirs", kind, shard, tie_word_embeddings=tied)
    assert (tmp_path / "theirs" / INDEX_FILE).exists() == (shard == "8KB")
    model = moe_reduce.load(tmp_path / "theirs")
    moe_reduce.save(model, tmp_path / "ours", shard_bytes=8000 if shard == "8KB" else 10**9)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert_same_params(moe_reduce.load(tmp_path / "ours").params, model.params)


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_transformers_opens_what_we_save(tmp_path: Path, kind: str, tied: bool):
    theirs = written(tmp_path / "theirs", kind, tie_word_embeddings=tied)
    model = moe_reduce.load(tmp_path / "theirs")
    fresh = dataclasses.replace(model, hf_config=None, source=None)
    moe_reduce.save(fresh, tmp_path / "ours", shard_bytes=8000)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(opened) is type(theirs)
    expected, found = tensors_by_name(theirs), tensors_by_name(opened)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(opened(tokens).logits, type(theirs).from_pretrained(tmp_path / "theirs")(tokens).logits)


def test_bfloat16_round_trip(tmp_path: Path):
    tiny("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    model = moe_reduce.load(tmp_path / "theirs")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(ml_dtypes.bfloat16)}
    moe_reduce.save(model, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "ours/config.json").read_bytes() == (tmp_path / "theirs/config.json").read_bytes()
    wide = moe_reduce.load(tmp_path / "theirs", dtype="float32")
    moe_reduce.save(wide, tmp_path / "wide")
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    assert_same_params(moe_reduce.load(tmp_path / "wide", dtype="bfloat16").params, model.params)


@pytest.mark.parametrize("name", OWN)
def test_own_architectures_round_trip(tmp_path: Path, name: str):
    params = random_params(OWN[name])
    moe_reduce.save(model_of(OWN[name], params), tmp_path / "model", shard_bytes=8000)
    loaded = moe_reduce.load(tmp_path / "model")
    assert loaded.config == OWN[name]
    assert_same_params(loaded.params, params)
    moe_reduce.save(loaded, tmp_path / "again", shard_bytes=8000)
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_names_of_our_own_architectures(tmp_path: Path):
    found = set()
    for name, config in OWN.items():
        moe_reduce.save(model_of(config, random_params(config)), tmp_path / name)
        found |= set(TensorFiles(tmp_path / name).entries)
    assert found >= {
        "model.experts.10.gate_proj.weight",
        "model.router.weight",
        "model.layers.2.router_bias",
        "model.layers.2.output_gain",
        "model.layers.2.score_offset",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.experts.10.gate_proj.weight",
        "model.embed_tokens.factor",
        "model.embed_tokens.projection",
        "model.norm.bias",
        "model.layers.2.input_layernorm.bias",
        "model.layers.2.self_attn.k_proj.bias",
        "model.layers.2.mlp.gate_proj.bias",
    }


@pytest.mark.parametrize("name", [*OWN, "neox"])
@pytest.mark.parametrize("end", [0, -1], ids=["first-axis", "last-axis"])
def test_sharded_loading_reads_the_same(tmp_path: Path, name: str, end: int):
    config = (OWN | {"neox": NEOX})[name]
    params = random_params(config)
    moe_reduce.save(model_of(config, params), tmp_path / "model")
    devices = jax.devices()[:4]
    assert len(devices) == 4, "the tests need several devices: conftest.py asks for 8"
    mesh = jax.sharding.Mesh(devices, ("x",))

    def shard(_: str, leaf: Any) -> jax.sharding.NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % 4 == 0]
        spec = ["x" if axes and axis == axes[end] else None for axis in range(len(leaf.shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    shardings = trees.map_with_path(shard, abstract_params(config))
    loaded = moe_reduce.load(tmp_path / "model", shardings=shardings)
    assert_same_params(loaded.params, params)
    for path, leaf in trees.flatten(loaded.params).items():
        assert leaf.sharding == trees.flatten(shardings)[path]
        assert path in ("embedding/factor", "unembedding/table") or not leaf.is_fully_replicated
    with pytest.raises(UserError, match="shardings"):
        moe_reduce.load(tmp_path / "model", shardings={"embedding": {}})


def test_parts_of_one_tensor_load_onto_a_mesh_and_compute_the_same(tmp_path: Path):
    params = random_params(NEOX)
    moe_reduce.save(model_of(NEOX, params), tmp_path / "model")
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    placed = moe_reduce.load(tmp_path / "model", shardings=sharding.model_shardings(mesh, NEOX))
    assert_same_params(placed.params, params)
    query = placed.params["layers"]["attention"]["query"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(4, 8, 2, 8)}  # width over fsdp and expert
    assert len(query.sharding.device_set) == 8
    tokens = np.arange(24).reshape(4, 6)
    whole = moe_reduce.load(tmp_path / "model")(tokens)
    np.testing.assert_allclose(placed(tokens), whole, atol=1e-5 * np.abs(whole).max())


def test_query_key_and_value_are_interleaved_by_head(tmp_path: Path):
    """By hand from the tensors on disk: rows are [heads, 3, head width]."""
    theirs = tensors_by_name(written(tmp_path, "gpt_neox"))
    attention = moe_reduce.load(tmp_path).params["layers"]["attention"]
    for layer in range(2):
        fused = theirs[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"].reshape(4, 3, 16, 64)
        biases = theirs[f"gpt_neox.layers.{layer}.attention.query_key_value.bias"].reshape(4, 3, 16)
        for part, name in enumerate(("query", "key", "value")):
            np.testing.assert_array_equal(attention[name][layer], fused[:, part].transpose(2, 0, 1))
            np.testing.assert_array_equal(attention[f"{name}_bias"][layer], biases[:, part])


def test_parts_of_one_tensor_have_one_dtype(tmp_path: Path):
    params = random_params(NEOX)
    mixed = trees.update(params, {"layers/attention/key": params["layers"]["attention"]["key"].astype(np.float16)})
    with pytest.raises(UserError, match=r"layers/attention/key float16.*differ|differ.*layers/attention/key float16"):
        moe_reduce.save(model_of(NEOX, mixed), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def change_tensors(directory: Path, change) -> None:
    arrays = safetensors.numpy.load_file(directory / SINGLE_FILE)
    change(arrays)
    safetensors.numpy.save_file(arrays, directory / SINGLE_FILE)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop(Q), Q),
        (lambda arrays: arrays.update({Q: arrays[Q].T.copy()}), Q),
        (lambda arrays: arrays.update({Q: arrays[Q][None]}), Q),
        (lambda arrays: arrays.update(extra=arrays[Q]), "extra"),
        (lambda arrays: arrays.update({"model.layers.2.self_attn.q_proj.weight": arrays[Q]}), "model.layers.2"),
        (lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"] + 1}), "tie_word"),
        (lambda arrays: arrays.update({Q: arrays[Q].astype(np.int32)}), Q),
        (lambda arrays: arrays.update({k: v.astype(np.float64) for k, v in arrays.items()}), "float64"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path: Path, change, words: str):
    written(tmp_path, "llama", tie_word_embeddings=True)
    change_tensors(tmp_path, change)
    with pytest.raises(UserError) as caught:
        moe_reduce.load(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [("llama", "lm_head.weight"), ("gpt_neox", "embed_out.weight")])
def test_the_table_of_tied_embeddings_may_have_the_name_of_the_output(tmp_path: Path, kind: str, name: str):
    """As safetensors.torch.save_model writes it, which keeps one name of a shared tensor."""
    written(tmp_path, kind, tie_word_embeddings=True)
    expected = moe_reduce.load(tmp_path)
    table = {"llama": "model.embed_tokens.weight", "gpt_neox": "gpt_neox.embed_in.weight"}[kind]
    change_tensors(tmp_path, lambda arrays: arrays.update({name: arrays.pop(table)}))
    found = moe_reduce.load(tmp_path)
    assert_same_params(found.params, expected.params)
    moe_reduce.save(found, tmp_path / "again")
    assert table in TensorFiles(tmp_path / "again").entries
    change_tensors(tmp_path, lambda arrays: arrays.pop(name))
    with pytest.raises(UserError, match=re.escape(table)):
        moe_reduce.load(tmp_path)


def test_tolerated_extras(tmp_path: Path):
    written(tmp_path, "llama", tie_word_embeddings=True)
    expected = moe_reduce.load(tmp_path).params

    def add(arrays: dict[str, Any]) -> None:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    change_tensors(tmp_path, add)
    assert_same_params(moe_reduce.load(tmp_path).params, expected)


def test_tolerated_extras_of_old_pythia(tmp_path: Path):
    written(tmp_path, "gpt_neox", tie_word_embeddings=True)
    expected = moe_reduce.load(tmp_path).params
    prefix = "gpt_neox.layers.1.attention"

    def add(arrays: dict[str, Any]) -> None:
        arrays[f"{prefix}.bias"] = np.tril(np.ones((1, 1, 64, 64), np.uint8))
        arrays[f"{prefix}.masked_bias"] = np.array(-1e9, np.float32)
        arrays[f"{prefix}.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        arrays["embed_out.weight"] = arrays["gpt_neox.embed_in.weight"].copy()

    change_tensors(tmp_path, add)
    assert_same_params(moe_reduce.load(tmp_path).params, expected)
    change_tensors(tmp_path, lambda arrays: arrays["embed_out.weight"].__setitem__(0, 7))
    with pytest.raises(UserError, match=r"embed_out\.weight .* differs from the embedding"):
        moe_reduce.load(tmp_path)
    change_tensors(tmp_path, lambda arrays: arrays.pop("embed_out.weight"))
    change_tensors(tmp_path, lambda arrays: arrays.update({f"{prefix}.scale": np.ones(1, np.float32)}))
    with pytest.raises(UserError, match=rf"{prefix}.scale"):
        moe_reduce.load(tmp_path)


def test_params_that_are_not_the_configs(tmp_path: Path):
    config = OWN["dense-factorised"]
    params = random_params(config)
    flat = trees.flatten(params)
    missing = {path: leaf for path, leaf in flat.items() if path != "final_norm/scale"}
    for wrong in (missing, flat | {"extra/scale": flat["final_norm/scale"]}, flat | {"final_norm/scale": np.ones(3)}):
        with pytest.raises(UserError, match=r"final_norm/scale|extra/scale"):
            list(write_items(trees.unflatten(wrong), config))
        with pytest.raises(UserError):
            moe_reduce.save(model_of(config, trees.unflatten(wrong)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = OWN["shared-factorised"]
    write_tensors(tmp_path, write_items(random_params(config), config))
    files = TensorFiles(tmp_path)
    read: list[str] = []
    original = TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: read.append(name) or original(self, name))
    check_names(files, config)
    assert not read
    read_params(files, config)
    assert sorted(read) == sorted(files.entries)
