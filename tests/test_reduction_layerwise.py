"""Layer by layer, a few experts at a time, gives the sums of the whole model."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reduction import files, layerwise, scores
from moe_reduce.reduction import pool as pooling


@pytest.fixture
def model(tiny_layer_moe):
    # every option that routing has; offset, bias and gain start as constants, so each is drawn anew
    options = {"output_gain": True, "selection_bias": True, "score_function": "sigmoid", "score_offset": True}
    moe = dataclasses.replace(tiny_layer_moe.moe, experts=6, **options)
    config = dataclasses.replace(tiny_layer_moe, init_std=0.3, layers=3, moe=moe)
    params = init_params(config, jax.random.key(0))
    drawn = trees.select(params, "layers/(output_gain|router_bias|score_offset)", expect=3)
    params = trees.update(
        params, {path: jax.random.normal(jax.random.key(i), x.shape) for i, (path, x) in enumerate(drawn.items())}
    )
    return Model(config, params, ExecutionConfig().resolve("cpu"))


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 10**9])
def test_equals_the_whole_model(model, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(layerwise, "CHUNK_BYTES", chunk_bytes)
    moe_reduce.save(model, tmp_path / "model")
    weights = np.ones((2, 12), np.float32)
    weights[1, 5:] = 0
    drawn = np.random.default_rng(0).integers(0, 64, (3, 2, 12)).astype(np.int32)
    batches = [{"tokens": tokens, "targets": tokens, "weights": weights} for tokens in drawn]
    found = layerwise.collect(files.open_directory(tmp_path / "model"), batches, model.execution)
    whole = scores.collect(model, batches)
    assert found.tokens == whole.tokens
    np.testing.assert_array_equal(found.counts, whole.counts)
    for name in ("weight", "weighted_norm", "norm", "maximum", "largest"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-5, err_msg=name)


def test_command_and_what_it_refuses(model, tmp_path, capsys):
    plain_options = {"output_gain": False, "selection_bias": False, "score_function": "softmax", "score_offset": False}
    moe = dataclasses.replace(model.config.moe, **plain_options)
    plain = dataclasses.replace(model.config, moe=moe)
    plain = dataclasses.replace(model, config=plain, params=init_params(plain, jax.random.key(0)))
    moe_reduce.save(plain, tmp_path / "model")
    moe_reduce.save(pooling.pool(plain, PoolStage(canonical=False)), tmp_path / "pool")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32))
    data = [f"--data={tmp_path / 'tokens.npy'}", "--sequence-length=16", "--criteria=all"]
    for name, more in (("whole", []), ("layers", ["--layer-wise"])):
        assert main(["score", f"--model={tmp_path / 'model'}", *data, f"--out={tmp_path / name}.json", *more]) == 0
    whole, layers = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "layers"))
    assert whole["counts"] == layers["counts"]
    for name, values in whole["scores"].items():
        np.testing.assert_allclose(layers["scores"][name], values, rtol=1e-5, err_msg=name)
    capsys.readouterr()
    assert main(["score", f"--model={tmp_path / 'pool'}", *data, f"--out={tmp_path / 'no.json'}", "--layer-wise"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "one pool for all layers" in line
