"""Pruning from file to file: quantised weights, mixed dtypes, damaged histories, and pools with a small bias."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from quantised_models import quantise_int8

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reduction import files, scores
from moe_reduce.reduction.pool import pool
from moe_reduce.reduction.prune import prune
from moe_reduce.storage.tensors import TensorFiles, write_tensors

TOKENS = np.random.default_rng(1).integers(0, 64, (2, 8)).astype(np.int32)
UNEVEN = ((0, 2), (0, 1, 3), (1, 2))


@pytest.fixture
def model(tiny_layer_moe) -> Model:
    """A Qwen3-MoE of 3 layers of 4 experts, 2 of them active."""
    config = dataclasses.replace(tiny_layer_moe, init_std=0.3, layers=3)
    return Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu"))


def pruned(directory: Path, kept, out: Path, capsys=None) -> Model | str:
    """The result of the command `prune`, made to keep these experts; its refusal with `capsys`."""
    values = np.array([[float(index in row) for index in range(4)] for row in kept], np.float32)
    scores.write(scores.Scores(1, np.ones_like(values), {"reap": values}), directory.parent / "made_up.json")
    uneven = len({len(row) for row in kept}) > 1
    keep = [f"--keep={sum(map(len, kept))}", "--scope=global"] if uneven else [f"--keep={len(kept[0])}"]
    given = [f"--model={directory}", f"--scores={directory.parent / 'made_up.json'}", f"--out={out}"]
    status = main(["prune", *given, *keep])
    if capsys is not None:
        assert status == 2
        return capsys.readouterr().err
    assert status == 0
    return moe_reduce.load(out)


def assert_same(found: trees.Tree, expected: trees.Tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("keep", [("router",), ()])
def test_quantised_experts_are_pruned_with_their_scales(model, tmp_path, keep):
    quantised = quantise_int8(model, keep)
    moe_reduce.save(quantised, tmp_path / "model")
    kept = ((0, 2), (1, 3), (0, 1))
    found = pruned(tmp_path / "model", kept, tmp_path / "out")
    assert_same(found.params, prune(quantised, kept).params)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_quantised_layers_of_different_sizes(model, tmp_path, capsys):
    quantised = quantise_int8(model)
    moe_reduce.save(quantised, tmp_path / "model")
    found = pruned(tmp_path / "model", UNEVEN, tmp_path / "out")
    assert found.config.moe.experts == 7
    places = [(layer, index) for layer, row in enumerate(UNEVEN) for index in row]
    for name in ("gate", "up", "down"):
        before, after = quantised.params["layers"]["experts"][name], found.params["experts"][name]
        for number, place in enumerate(places):
            np.testing.assert_array_equal(after.codes[number], before.codes[place])
            np.testing.assert_array_equal(after.scales[number], before.scales[place])
    moe_reduce.save(quantise_int8(model, ()), tmp_path / "routers")
    assert "routers" in (line := pruned(tmp_path / "routers", UNEVEN, tmp_path / "no", capsys))
    assert "--scope=layer" in line


def test_quantised_weights_are_scored_layer_by_layer(model, tmp_path):
    moe_reduce.save(quantise_int8(model), tmp_path / "model")
    np.save(tmp_path / "tokens.npy", TOKENS)
    arguments = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'tokens.npy'}", "--sequence-length=8"]
    assert main(["score", *arguments, "--layer-wise", f"--out={tmp_path / 'layers.json'}"]) == 0
    assert main(["score", *arguments, f"--out={tmp_path / 'whole.json'}"]) == 0
    layers, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("layers", "whole"))
    assert layers["counts"] == whole["counts"]
    np.testing.assert_allclose(layers["scores"]["reap"], whole["scores"]["reap"], rtol=1e-5)


def test_integers_of_another_program_are_refused_by_name(model, tmp_path, capsys):
    moe_reduce.save(model, tmp_path / "model")
    rewritten(tmp_path / "model", lambda name, x: x.astype(np.int8) if "layers.1.mlp.experts.2.up" in name else x)
    line = pruned(tmp_path / "model", ((0, 1),) * 3, tmp_path / "out", capsys)
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in line
    assert "int8" in line


def rewritten(directory: Path, change) -> None:
    found = TensorFiles(directory)
    arrays = {name: change(name, found.read(name).copy()) for name in found.entries}
    write_tensors(directory, [(name, x.shape, x.dtype, x) for name, x in arrays.items()])


def test_dtypes_that_differ_between_layers_and_experts(model, tmp_path):
    """Loading takes the widest of a parameter; pruning keeps the dtype of each tensor."""

    def mixed(name: str, x: np.ndarray) -> np.ndarray:
        if "layers.0.mlp.gate.weight" in name or "layers.2.mlp.experts.1.down" in name:
            return x.astype(ml_dtypes.bfloat16)
        return x.astype(np.float16) if "layers.1.self_attn" in name else x

    moe_reduce.save(model, tmp_path / "model")
    rewritten(tmp_path / "model", mixed)
    loaded = moe_reduce.load(tmp_path / "model")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"float32"}
    stored = TensorFiles(tmp_path / "model").read("model.layers.1.self_attn.q_proj.weight")
    query = np.asarray(loaded.params["layers"]["attention"]["query"][1]).reshape(stored.shape[::-1])
    np.testing.assert_array_equal(query.T, stored.astype(np.float32))
    kept = ((0, 2), (1, 3), (0, 1))
    assert_same(pruned(tmp_path / "model", kept, tmp_path / "even").params, prune(loaded, kept).params)
    dtypes = {str(entry.dtype) for entry in TensorFiles(tmp_path / "even").entries.values()}
    assert dtypes == {"float32", "float16", "bfloat16"}
    uneven = pruned(tmp_path / "model", UNEVEN, tmp_path / "uneven")
    router = loaded.params["layers"]["router"]["weight"]
    expected = np.concatenate([np.asarray(router[layer])[:, list(row)] for layer, row in enumerate(UNEVEN)], axis=1)
    np.testing.assert_array_equal(uneven.params["router"]["weight"], expected)


@pytest.mark.parametrize(("left", "right"), [(np.float16, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float32)])
def test_two_halves_are_read_as_float32(model, tmp_path, left, right):
    moe_reduce.save(model, tmp_path / "model")
    rewritten(tmp_path / "model", lambda name, x: x.astype(left if "layers.1." in name else right))
    query = moe_reduce.load(tmp_path / "model").params["layers"]["attention"]["query"]
    assert query.dtype == np.float32
    expected = np.asarray(model.params["layers"]["attention"]["query"]).astype(right).astype(np.float32)
    np.testing.assert_array_equal(query[0], expected[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: [row[:-1] for row in kept],
        lambda kept: kept[:-1],
        lambda kept: [[*row[:-1], row[0]] for row in kept],
        lambda _: [],
        lambda _: [5],
        lambda _: "all",
        lambda kept: [[[layer, "1"] for layer, _ in row] for row in kept],
        lambda kept: [[[layer, -1 - index] for layer, index in row] for row in kept],
    ],
    ids=["shorter rows", "fewer rows", "twice", "empty", "no rows", "a word", "words", "negative"],
)
def test_kept_experts_of_a_damaged_manifest_do_not_go_on(model, tmp_path, capsys, damage):
    moe_reduce.save(model, tmp_path / "model")
    pruned(tmp_path / "model", ((0, 1, 2),) * 3, tmp_path / "first")
    manifest = tmp_path / "first/manifest.json"
    content = json.loads(manifest.read_text())
    content["chain"][-1]["kept_experts"] = damage(content["chain"][-1]["kept_experts"])
    manifest.write_text(json.dumps(content))
    values = np.ones((3, 3), np.float32)
    scores.write(scores.Scores(1, values, {"reap": values}), tmp_path / "again.json")
    capsys.readouterr()
    arguments = [f"--model={tmp_path / 'first'}", f"--scores={tmp_path / 'again.json'}", "--keep=2"]
    assert main(["prune", *arguments, f"--out={tmp_path / 'second'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json" in line
    assert "kept_experts" in line or "chain" in line
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(("bias", "known"), [(None, True), (2000.0, True), (1.0, False)])
def test_layers_that_alone_choose_an_expert_are_known_by_what_their_routers_can_reach(model, tmp_path, bias, known):
    moe_reduce.save(pool(model, PoolStage(bias=bias, router="shared")), tmp_path / "pool")
    found = files.exclusive_layers(files.open_directory(tmp_path / "pool"))
    expected = np.repeat(np.arange(3), 4) if known else None
    np.testing.assert_array_equal(found, expected)


def test_the_reach_of_a_router_is_an_upper_bound(model, tmp_path):
    moe_reduce.save(pool(model, PoolStage(router="shared")), tmp_path / "pool")
    pooled = moe_reduce.load(tmp_path / "pool")
    read = pooled.apply({"tokens": TOKENS}, collect=("hidden",)).collected["hidden"]["router_input"]
    logits = np.einsum("NBTD,DE->NBTE", np.asarray(read, np.float64), np.asarray(pooled.params["router"]["weight"]))
    reach = files._largest_logits(files.open_directory(tmp_path / "pool"))
    largest = np.abs(logits).max(axis=(1, 2))
    assert np.all(largest <= reach)
    assert np.max(largest / reach) > 0.2, "a bound that is far too large would recognise no pool"


def test_routers_of_layers_are_compared_each_with_its_own(model, tmp_path):
    moe_reduce.save(pool(model, PoolStage(bias=2000.0, router="layer")), tmp_path / "pool")
    found = files.exclusive_layers(files.open_directory(tmp_path / "pool"))
    np.testing.assert_array_equal(found, np.repeat(np.arange(3), 4))


def test_uneven_pruning_of_weights_that_are_not_renormalised_biases_the_logits(model, tmp_path):
    moe = dataclasses.replace(model.config.moe, normalize=False)
    moe_reduce.save(dataclasses.replace(model, config=dataclasses.replace(model.config, moe=moe)), tmp_path / "model")
    found = files.pruned(files.open_directory(tmp_path / "model"), UNEVEN).config.moe
    assert found is not None
    assert (found.placement, found.bias_on, found.normalize) == ("shared", "logits", False)
