"""Dropout of adapters: what is dropped, from which draws, and that a resumed run drops the same."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters import disturbed, model_of
from test_adapters_run import _adapt, write
from training_runs import random_batch, unmeasured_peak

import moe_reduce
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, checks
from moe_reduce.adapters.dropout import while_training
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models import deltas
from moe_reduce.training import job

DROPPING = AdapterConfig(rank=3, alpha=6.0, dropout=0.5)


def _adapted(config=DROPPING, layers="all"):
    base = model_of("dense")
    config = AdapterConfig(**{**vars(config), "layers": layers})
    return adapters.activate(base, disturbed(adapters.init(config, base))), config


def _draws(first):
    return {"draws": jnp.arange(first, first + 8, dtype=jnp.uint32)}


def test_dropped_inputs_are_zero_and_the_others_scaled():
    model, config = _adapted()
    tree = while_training(config, model.params, _draws(0))[deltas.ADAPTER]
    delta = jax.tree.map(lambda leaf: leaf[1], tree["layers"]["attention"]["query"])
    x = jax.random.normal(jax.random.key(0), (1000, 16))
    plain = {name: leaf for name, leaf in delta.items() if name not in ("dropout", "layer_numbers")}
    mask = jax.random.bernoulli(jax.random.wrap_key_data(delta["dropout"]["key"]), 0.5, x.shape)
    assert 0.48 < float(jnp.mean(mask)) < 0.52
    found = deltas.added(x, plain | {"dropout": delta["dropout"]}, 16, jnp.matmul)
    expected = 2.0 * (np.where(mask, x * 2, 0) @ delta["in"]["matrix"] @ delta["out"]["matrix"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_draws_layers_and_matrices_have_masks_of_their_own():
    model, config = _adapted()
    trees_of = [while_training(config, model.params, _draws(first)) for first in (0, 0, 8)]
    first, again, other = (trees.flatten(tree) for tree in trees_of)
    paths = [path for path in first if path.endswith("dropout/key")]
    assert len(paths) == 2
    for path in paths:
        np.testing.assert_array_equal(first[path], again[path])
        assert not np.array_equal(first[path], other[path])
    assert len({tuple(key) for path in paths for key in np.asarray(first[path])}) == 2 * len(paths)


@pytest.mark.parametrize("layers", ["all", "1"])
def test_logits_change_in_training_only(layers):
    model, config = _adapted(layers=layers)
    batch = random_batch()
    plain = model.apply(batch).logits_BTV
    dropping = model.with_params(while_training(config, model.params, _draws(0)))
    assert float(jnp.max(jnp.abs(dropping.apply(batch).logits_BTV - plain))) > 1e-3
    unchanged = while_training(AdapterConfig(rank=3, alpha=6.0), model.params, _draws(0))
    np.testing.assert_array_equal(model.with_params(unchanged).apply(batch).logits_BTV, plain)


def test_a_resumed_run_drops_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)
    file = write(tmp_path)
    more = ["--config.adapter.dropout=0.5", "--config.train.steps=4", "--config.train.accumulation=2"]
    assert _adapt(file, tmp_path / "run", *more) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("model", "adapter", "checkpoints/4"):
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again/summary.json").unlink()
    assert _adapt(file, tmp_path / "again", *more) == 0
    assert _adapt(file, tmp_path / "without", *more[1:]) == 0
    config = moe_reduce.load(tmp_path / "base").config
    once, resumed, without = (
        trees.flatten(adapter_directory.load(tmp_path / name / "adapter", config, None).tree)
        for name in ("run", "again", "without")
    )
    for path, leaf in once.items():
        np.testing.assert_array_equal(leaf, resumed[path], err_msg=path)
    assert any(not np.allclose(leaf, without[path]) for path, leaf in once.items())
    written = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert written["lora_dropout"] == 0.5


def test_what_is_refused():
    experts = model_of("layer").config
    with pytest.raises(UserError, match=r"adapter\.dropout supports single matrices only"):
        checks.check(AdapterConfig(rank=2, targets="mlp", dropout=0.1), experts)
    with pytest.raises(UserError, match=r"adapter\.dropout must be at least 0\.0 and below 1\.0"):
        checks.check(AdapterConfig(rank=2, dropout=1.0), experts)
