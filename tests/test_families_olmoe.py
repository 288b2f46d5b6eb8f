"""OLMoE as transformers writes it: scored, pruned from file to file, pooled, and its heads grouped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers_models import written

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import PoolStage
from moe_reduce.families import of_config
from moe_reduce.reduction.heads import group_heads
from moe_reduce.reduction.pool import pool
from moe_reduce.reduction.prune import prune

NORMALISED = {"norm_topk_prob": True, "clip_qkv": 0.9}
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    written(tmp_path / "model", "olmoe", clip_qkv=0.9)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 61, (8, 16), dtype=np.int32))
    return tmp_path / "model"


def scores_of(directory: Path, *more: str) -> Path:
    out = directory.parent / f"scores{len(more)}.json"
    data = [f"--data={directory.parent / 'tokens.npy'}", "--sequence-length=16", "--batch-size=4", "--criteria=all"]
    assert main(["score", f"--model={directory}", *data, f"--out={out}", *more]) == 0
    return out


def test_layer_by_layer_scores_are_those_of_the_whole_model(directory: Path):
    whole, layers = (json.loads(scores_of(directory, *more).read_text()) for more in ([], ["--layer-wise"]))
    assert whole["counts"] == layers["counts"]
    assert np.shape(whole["counts"]) == (2, 6)
    for name, values in whole["scores"].items():
        np.testing.assert_allclose(layers["scores"][name], values, rtol=1e-5, err_msg=name)


def test_a_pruned_directory_is_the_transform_and_opens_in_transformers(directory: Path, tmp_path: Path):
    arguments = [f"--model={directory}", f"--scores={scores_of(directory)}", "--keep=0.5", f"--out={tmp_path / 'out'}"]
    assert main(["prune", *arguments]) == 0
    small = moe_reduce.load(tmp_path / "out")
    (*_, step) = small.chain
    kept = tuple(tuple(index for _, index in row) for row in step.kept_experts or ())
    expected = prune(moe_reduce.load(directory), kept)
    flat = trees.flatten(expected.params)
    assert set(flat) == set(trees.flatten(small.params))
    for path, leaf in trees.flatten(small.params).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(theirs, transformers.OlmoeForCausalLM)
    assert (theirs.config.num_experts, theirs.config.clip_qkv) == (3, 0.9)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(TOKENS_BT).long()).logits.numpy()
    np.testing.assert_allclose(small(TOKENS_BT), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_pool_computes_the_same_where_weights_are_renormalised(tmp_path: Path):
    written(tmp_path / "model", "olmoe", **NORMALISED)
    model = moe_reduce.load(tmp_path / "model")
    pooled = pool(model, PoolStage(canonical=False))
    assert (of_config(model.config).name, of_config(pooled.config).name) == ("olmoe", "moe_reduce")
    moe_reduce.save(pooled, tmp_path / "pool")
    again = moe_reduce.load(tmp_path / "pool")
    assert again.config == pooled.config
    logits = model(TOKENS_BT)
    np.testing.assert_allclose(again(TOKENS_BT), logits, atol=1e-5 * np.abs(logits).max())


def test_uneven_pruning_from_file_to_file_keeps_the_rest_of_the_architecture(tmp_path: Path):
    written(tmp_path / "model", "olmoe", **NORMALISED)
    scores = {"tokens": 1, "counts": [[1] * 6] * 2, "scores": {"reap": [[6, 5, 4, 3, 0, 0], [9, 9, 9, 9, 9, 9]]}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    arguments = ["--keep=9", "--scope=global", "--criterion=reap", f"--scores={tmp_path / 'scores.json'}"]
    assert main(["prune", f"--model={tmp_path / 'model'}", *arguments, f"--out={tmp_path / 'out'}"]) == 0
    small = moe_reduce.load(tmp_path / "out")
    assert small.config.moe is not None
    assert (small.config.moe.placement, small.config.moe.experts) == ("shared", 9)
    assert (small.config.qk_norm_scope, small.config.clip_qkv) == ("projection", 0.9)
    before = moe_reduce.load(tmp_path / "model").params
    (kept,) = small.chain[-1].kept_experts or ()
    assert len({sum(layer == number for layer, _ in kept) for number in range(2)}) == 2
    for place, (layer, index) in enumerate(kept):
        expected = before["layers"]["experts"]["down"][layer, index]
        np.testing.assert_array_equal(small.params["experts"]["down"][place], expected)
    assert np.isfinite(small(TOKENS_BT)).all()


def test_a_pool_computes_the_same_where_weights_are_not_renormalised(directory: Path):
    """The bias acts inside the softmax, whose denominator is then that of the home layer."""
    model = moe_reduce.load(directory)
    pooled = pool(model, PoolStage(canonical=False))
    logits = model(TOKENS_BT)
    np.testing.assert_allclose(pooled(TOKENS_BT), logits, atol=1e-5 * np.abs(logits).max())
    with pytest.raises(UserError, match="norm_topk_prob"):  # which σ(z - t) cannot reproduce
        pool(model, PoolStage(canonical=False, score_function="sigmoid"))


def test_grouping_equal_heads_changes_no_logit(tmp_path: Path):
    """The norm over all heads together is the same over one of each group of equals."""
    written(tmp_path, "olmoe", num_key_value_heads=4)
    model = moe_reduce.load(tmp_path)
    flat = trees.flatten(model.params)
    paths = [f"layers/attention/{name}" for name in ("key", "value", "key_norm/scale")]
    equal = {path: np.repeat(np.asarray(flat[path])[..., ::2, :], 2, axis=-2) for path in paths}
    model = model.with_params(trees.update(model.params, equal))
    grouped = group_heads(model, 2)
    assert grouped.params["layers"]["attention"]["key_norm"]["scale"].shape == (2, 2, 6)
    logits = model(TOKENS_BT)
    np.testing.assert_allclose(grouped(TOKENS_BT), logits, atol=1e-5 * np.abs(logits).max())


def test_clipping_limits_queries_keys_and_values(directory: Path):
    model = moe_reduce.load(directory)
    collected = model.apply({"tokens": TOKENS_BT}, collect=("keys_values",)).collected["keys_values"]
    values = [np.abs(leaf).max() for path, leaf in trees.flatten(collected).items() if "value" in path]
    assert values
    assert max(values) == np.float32(0.9)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_clip_that_leaves_nothing_is_refused(tmp_path: Path, limit: float):
    written(tmp_path, "olmoe")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"clip_qkv": limit}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="clip_qkv must be positive"):
        moe_reduce.load(tmp_path)


def test_a_head_width_of_its_own_is_refused(tmp_path: Path):
    written(tmp_path, "olmoe")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="head_dim=8 is not supported"):
        moe_reduce.load(tmp_path)
