"""Calibration layer by layer: what the matrices read, scales folded without changing an output, and rare experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS, initial_params, random_batch

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import parse
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path
from moe_reduce.models.weights import Quantised, dequantised
from moe_reduce.quantization import calibrated
from moe_reduce.quantization.calibrated import Settings
from moe_reduce.quantization.folds import between, folds
from moe_reduce.quantization.moments import RoutedRows, expert_moments, layer_moments, source_of
from moe_reduce.quantization.round_to_nearest import schemes_by_path
from moe_reduce.quantization.rounding import nearest_rounded

EXECUTION = ExecutionConfig(dispatch="reference").resolve("cpu")
INT4 = parse("int4-channel")


def model_of(kind):
    """Weights large enough that layers differ and experts are used unevenly, and no bias of zero."""
    generator = np.random.default_rng(0)

    def other(_, leaf):
        return leaf * (12 if leaf.ndim > 2 else 1) + jnp.asarray(generator.normal(0, 0.05, leaf.shape), jnp.float32)

    return Model(MODELS[kind], trees.map_with_path(other, initial_params(MODELS[kind])), EXECUTION)


def stacked_paths(config):
    return [path for path, record in by_path(config).items() if record.stacked]


@pytest.mark.parametrize("kind", ["dense", "neox", "layer", "shared"])
def test_folding_changes_no_logit(kind):
    model, batch = model_of(kind), random_batch(rows=2)
    flat = trees.flatten(model.params)
    generator = np.random.default_rng(0)
    layers = []
    for number in range(model.config.layers):
        leaves = {path: flat[path][number] for path in stacked_paths(model.config)}
        for fold in folds(model.config):
            inputs = fold.readers[0].matrix_shape[0]
            scale_I = fold.shared(jnp.asarray(np.exp(generator.normal(0, 1, inputs)), jnp.float32))
            leaves = fold.apply(leaves, scale_I)
        layers.append(leaves)
    stacked = {path: jnp.stack([leaves[path] for leaves in layers]) for path in layers[0]}
    folded = model.with_params(trees.update(model.params, stacked))
    changed = {path for path in stacked if not np.array_equal(stacked[path], flat[path])}
    assert len(changed) == {"dense": 9, "neox": 10, "layer": 9, "shared": 5}[kind]
    before, after = (np.asarray(one.apply(batch).logits_BTV) for one in (model, folded))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())


def test_an_experts_up_folds_into_its_down():
    model = model_of("layer")
    leaves = {path: leaf[0, 1] for path, leaf in trees.flatten(model.params).items() if "/experts/" in path}
    fold = between(model.config, "experts")
    scaled = fold.apply(leaves, jnp.exp(jnp.linspace(-1, 1, 16)))
    gate, up, down = ("/".join(("layers/experts", name)) for name in ("gate", "up", "down"))
    x = jax.random.normal(jax.random.key(0), (5, 16))
    before, after = (jax.nn.silu(x @ w[gate]) * (x @ w[up]) @ w[down] for w in (leaves, scaled))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert not np.allclose(scaled[down], leaves[down])


def test_moments_are_of_the_tokens_that_count():
    """A layer's own inputs by hand: the norm of the residual stream before attention."""
    model, batch = model_of("dense"), random_batch(masked=True)
    hidden = model.apply(batch | {"segments": None, "positions": None}, collect=("hidden",)).collected["hidden"]
    tree = jax.tree.map(lambda leaf: leaf[1], model.params["layers"])
    seen = layer_moments(model.config, EXECUTION, tree, [hidden["block_input"][1]], [batch["weights"]])
    assert set(seen) == {"layers/attention D", "layers/attention HC", "layers/mlp D", "layers/mlp F"}
    x = np.asarray(hidden["block_input"][1], np.float64).reshape(-1, 16)[np.asarray(batch["weights"]).reshape(-1) > 0]
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + model.config.norm_epsilon)
    x = x * np.asarray(tree["attention_norm"]["scale"], np.float64)
    found = seen["layers/attention D"]
    np.testing.assert_allclose(found.hessian_II, x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.mean_size_I, np.abs(x).mean(axis=0), rtol=1e-4)
    assert float(found.rows) == len(x) == float(np.sum(batch["weights"]))
    assert source_of(by_path(model.config)["layers/attention/key"]) == "layers/attention D"


def test_an_expert_sees_the_tokens_routed_to_it_and_no_others():
    model, batch = model_of("layer"), random_batch(masked=True)
    found = model.apply(batch, collect=("hidden", "assignments")).collected
    normed, chosen = found["hidden"]["router_input"][0], found["assignments"]["expert"][0]
    counted = np.asarray(batch["weights"]).reshape(-1) > 0
    routed = RoutedRows(
        [normed[:4], normed[4:]], [chosen[:4], chosen[4:]], [batch["weights"][:4], batch["weights"][4:]]
    )
    for expert in range(4):
        mine = np.any(np.asarray(chosen).reshape(-1, 2) == expert, axis=1) & counted
        x = np.asarray(normed, np.float64).reshape(-1, 16)[mine]
        assert routed.count(expert) == mine.sum()
        seen = expert_moments(*routed.of(expert))
        np.testing.assert_allclose(seen.hessian_II, x.T @ x, rtol=1e-4, atol=1e-3)
        assert float(seen.rows) == mine.sum()


def schemes_of(config, **changes):
    found = dict.fromkeys({record.component for record in by_path(config).values() if record.is_matrix}, INT4)
    found.pop("router", None)
    return schemes_by_path(config, found | changes)


@pytest.mark.parametrize("kind", ["dense", "layer", "shared"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_whole_model(kind, method):
    model = model_of(kind)
    batches = [random_batch(seed, rows=4) for seed in range(2)]
    schemes = schemes_of(model.config)
    found, report = calibrated.quantise(model, batches, Settings(method, schemes, minimum_rows=1))
    records = by_path(model.config)
    for path, leaf in trees.flatten(found.params).items():
        assert isinstance(leaf, Quantised) == (path in schemes), path
        assert tuple(leaf.shape) == records[path].shape
    assert report.rare == []
    assert set(report.errors()) == {records[path].component for path in schemes} - {"embedding", "unembedding"}
    assert all(0 < error < 0.2 for error in report.errors().values())
    plain = calibrated.quantise(model, batches, Settings("rtn", schemes))[1].errors()
    if method == "gptq":
        assert all(report.errors()[name] < plain[name] for name in plain)
    if method == "awq":
        assert sum(report.errors().values()) < sum(plain.values())


def test_a_layer_reads_what_the_quantised_layers_before_it_give():
    model = model_of("layer")
    schemes = schemes_of(model.config)
    states = []

    class Noting(calibrated.Calibration):
        def layer(self, number, layer, rest, text):
            states.append(text.states[0])
            return super().layer(number, layer, rest, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "Calibration", Noting)
        found, _ = calibrated.quantise(model, [random_batch(rows=4)], Settings("gptq", schemes, minimum_rows=1))
    hidden = found.apply(random_batch(rows=4), collect=("hidden",)).collected["hidden"]["block_input"]
    np.testing.assert_allclose(jnp.stack(states), hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_rare_expert_is_named_and_rounded_to_nearest(method):
    model = model_of("layer")
    batches, schemes = [random_batch(rows=4)], schemes_by_path(model.config, {"experts": INT4})
    found, report = calibrated.quantise(model, batches, Settings(method, schemes, minimum_rows=60))
    counts = np.asarray(_counts(model, batches[0]))
    assert [(layer, expert) for layer, expert, _ in report.rare if layer == 0] == [
        (0, expert) for expert in range(4) if counts[0, expert] < 60
    ]
    assert 0 < len(report.rare) < 8
    assert all(rows < 60 for _, _, rows in report.rare)
    _, expert, _ = report.rare[0]
    record = by_path(model.config)["layers/experts/up"]
    if method == "gptq":
        value = trees.flatten(found.params)[record.path]
        expected = nearest_rounded(trees.flatten(model.params)[record.path][0, expert], record, INT4).value
        np.testing.assert_array_equal(dequantised(value, jnp.float32)[0, expert], expected.dequantised())


def _counts(model, batch):
    return model.apply(batch, collect=("routing",)).collected["routing"]["counts_E"]


def test_without_text_there_is_nothing_to_calibrate_with():
    model = model_of("dense")
    with pytest.raises(UserError, match="no tokens to calibrate with"):
        calibrated.quantise(model, [], Settings("gptq", schemes_of(model.config)))
