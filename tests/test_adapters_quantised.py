"""Adapters over a quantised base (QLoRA, arXiv:2305.14314): gradients through frozen codes, and merging back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS, initial_params, random_batch, token_data, unmeasured_peak

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, BalanceConfig, ExecutionConfig
from moe_reduce.core.schemes import parse
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.weights import dequantised, is_quantised
from moe_reduce.quantization.round_to_nearest import every_component, quantise
from moe_reduce.training import job
from moe_reduce.training.losses import next_token_loss

EXECUTION = ExecutionConfig(dispatch="reference").resolve("cpu")
WIDE = {"width": 64, "head_width": 16}
ADAPTERS = {
    "lora": AdapterConfig(targets="q,v,down", rank=2, layers="top:1"),
    "dora": AdapterConfig(method="dora", targets="q,v", rank=2),
    "skema": AdapterConfig(method="skema", targets="q,down", sketch_width=4, projection="gaussian"),
}


def base_of(kind, scheme):
    moe = MODELS[kind].moe
    sizes = WIDE | ({"feed_forward_width": 64} if moe is None else {"moe": dataclasses.replace(moe, width=64)})
    config = dataclasses.replace(MODELS[kind], **sizes)
    params = jax.tree.map(lambda leaf: leaf * 4, initial_params(config))
    return quantise(Model(config, params, EXECUTION), every_component(config, parse(scheme)))


def disturbed(adapter):
    def other(path, leaf):
        if not adapters.trained(adapter.config, path):
            return leaf
        return leaf + 0.02 * jax.random.normal(jax.random.key(len(path)), leaf.shape)

    flat = {path: other(path, leaf) for path, leaf in trees.flatten(adapter.tree).items()}
    return dataclasses.replace(adapter, tree=trees.unflatten(flat))


@pytest.mark.parametrize(
    ("kind", "scheme", "method"),
    [("dense", "nf4", "lora"), ("dense", "int4-g32", "dora"), ("layer", "nf4", "skema"), ("layer", "int8", "lora")],
)
def test_gradients_pass_through_the_codes_as_through_their_values(kind, scheme, method):
    base = base_of(kind, scheme)
    plain = base.with_params(
        trees.map_with_path(lambda _, leaf: dequantised(leaf, jnp.float32) if is_quantised(leaf) else leaf, base.params)
    )
    adapter = disturbed(adapters.init(ADAPTERS[method], base))
    batch = random_batch(rows=2)

    @jax.jit
    def slope(tree, params):
        def loss(tree):
            return next_token_loss(base.with_params({}), BalanceConfig(), None, {**params, ADAPTER: tree}, batch)[0]

        return jax.value_and_grad(loss, allow_int=True)(tree)

    (loss, found), (expected, wanted) = (slope(adapter.tree, model.params) for model in (base, plain))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for path, leaf in trees.flatten(found).items():
        if adapters.trained(adapter.config, path):
            target = np.asarray(trees.flatten(wanted)[path])
            assert np.abs(target).max() > 0
            np.testing.assert_allclose(leaf, target, rtol=1e-3, atol=1e-4 * np.abs(target).max(), err_msg=path)


@pytest.mark.parametrize(("kind", "scheme", "method"), [("dense", "nf4", "lora"), ("layer", "int4-g32", "skema")])
def test_merging_back_requantises_what_the_adapter_changed(kind, scheme, method):
    base = base_of(kind, scheme)
    adapter = disturbed(adapters.init(ADAPTERS[method], base))
    merged = merging.merge(base, adapter)
    stored = merging.requantised(merged, base, adapter)
    before, whole, after = (trees.flatten(model.params) for model in (base, merged, stored))
    assert jax.tree.structure(stored.params) == jax.tree.structure(base.params)
    for path, value in after.items():
        if not is_quantised(value):
            continue
        if is_quantised(whole[path]):  # not a target
            assert value is before[path]
            continue
        exact = np.asarray(whole[path])
        error = np.linalg.norm(np.asarray(dequantised(value, jnp.float32)) - exact) / np.linalg.norm(exact)
        assert 0 < error < 0.15
        if method == "lora":  # of the last layer only
            jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours[0], theirs[0]), value, before[path])
            assert not np.array_equal(value.codes[1], before[path].codes[1])
    planned = jax.eval_shape(
        lambda params: merging.requantised(merged, base.with_params(params), adapter).params, base.params
    )
    assert jax.tree.structure(planned) == jax.tree.structure(stored.params)


def test_a_base_without_quantised_targets_stays():
    params = initial_params(MODELS["dense"])
    model = Model(MODELS["dense"], params, EXECUTION)
    adapter = adapters.init(ADAPTERS["lora"], model)
    merged = merging.merge(model, adapter)
    assert merging.requantised(merged, model, adapter) is merged


CONFIG = """
from moe_reduce.core import config as defaults


def get_config():
    config = defaults.adapt_base()
    config.model = {model!r}
    config.mesh.data = 1
    config.adapter.update(targets="q,v,mlp", rank=2)
    config.data.update(source={source!r}, sequence_length=32, validation_fraction=0.25)
    config.train.update(
        steps=4, batch_size=8, learning_rate=3e-2, log_every=1, evaluate_every=4, checkpoint_every=4, evaluate_batches=1
    )
    return config
"""


def test_a_run_over_int4_leaves_int4_and_says_what_it_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "peak", unmeasured_peak)
    moe_reduce.save(base_of("dense", "int4-g32"), tmp_path / "base")
    data = token_data(tmp_path)
    text = CONFIG.format(model=str(tmp_path / "base"), source=data.source)
    (tmp_path / "whole.py").write_text(
        text.replace("    return config", "    config.adapter = None\n    return config")
    )
    (tmp_path / "lora.py").write_text(text)
    assert main(["adapt", f"--config={tmp_path / 'whole.py'}", f"--workdir={tmp_path / 'whole'}"]) == 2
    assert "is quantised, which cannot train: give an adapter" in capsys.readouterr().err
    assert main(["adapt", f"--config={tmp_path / 'lora.py'}", f"--workdir={tmp_path / 'lora'}"]) == 0
    assert "requantised; matrices changed by at most" in capsys.readouterr().out
    model = moe_reduce.load(tmp_path / "lora/model")
    schemes = {str(leaf.scheme) for leaf in trees.flatten(model.params).values() if is_quantised(leaf)}
    assert schemes == {"int4-g32"}
    report = json.loads((tmp_path / "lora/equivalence.json").read_text())
    assert report["equivalent"]
    assert set(report["requantised"]["perplexity"]) == {"before", "after"}
    sizes = report["requantised"]["parameter_bytes"]
    assert sizes["after"] < 0.5 * sizes["before"]
    merge = ["merge", f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'lora/adapter'}"]
    assert main([*merge, f"--out={tmp_path / 'merged'}"]) == 0
    assert "requantised: perplexity" in capsys.readouterr().out
    assert main([*merge, f"--out={tmp_path / 'wide'}", "--full-precision"]) == 0
    merged, wide = (trees.flatten(moe_reduce.load(tmp_path / name).params) for name in ("merged", "wide"))
    changed = [path for path in merged if is_quantised(merged[path]) and not is_quantised(wide[path])]
    assert len(changed) == 5
