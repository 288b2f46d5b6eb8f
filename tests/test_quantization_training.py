"""Quantisation-aware training: code points by hand, identity gradients, and what is evaluated and saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS, initial_params, metrics, random_batch, run_config, token_data, unmeasured_peak

import moe_reduce
from moe_reduce.core import trees
from moe_reduce.core.config import AdaptConfig, BalanceConfig, ExecutionConfig, QATConfig, TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import parse
from moe_reduce.data.batches import validation_batches
from moe_reduce.data.prepare import prepare
from moe_reduce.inference.evaluate import measure
from moe_reduce.models.parameters import by_path
from moe_reduce.models.weights import is_quantised
from moe_reduce.quantization import fake
from moe_reduce.runs.train import train
from moe_reduce.training import job
from moe_reduce.training.losses import language_model_task

TERNARY = parse("ternary")
EXECUTION = ExecutionConfig(dispatch="reference").resolve("cpu")


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


def _matrix(path, kind="dense", scale=1.0):
    record = by_path(MODELS[kind])[path]
    return record, np.random.default_rng(0).normal(0, scale, record.shape).astype(np.float32)


@pytest.mark.parametrize("path", ["layers/experts/down", "embedding/table"])
def test_ternary_by_hand(path):
    """Each matrix of each expert has its own mean magnitude as scale (arXiv:2402.17764)."""
    record, values = _matrix(path, "layer")
    found = np.asarray(fake.SchemeRounding(TERNARY)(jnp.asarray(values), record))
    matrices, rounded = (x.reshape(-1, *x.shape[-2:]).astype(np.float64) for x in (values, found))
    scale = np.abs(matrices).mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(rounded, np.clip(np.round(matrices / scale), -1, 1) * scale, rtol=1e-5)
    if record.stacked:
        np.testing.assert_allclose(fake.SchemeRounding(TERNARY)(jnp.asarray(values[0]), record), found[0], rtol=1e-6)


@pytest.mark.parametrize(("kind", "dispatch"), [("dense", "reference"), ("layer", "blocks"), ("shared", "ragged")])
def test_the_loss_is_of_rounded_values_and_the_gradient_is_theirs(kind, dispatch):
    """Straight through: the gradient of the masters is the gradient at the rounded values, leaf by leaf."""
    config, execution = MODELS[kind], dataclasses.replace(EXECUTION, dispatch=dispatch, block_rows=8)
    schemes = fake.parse("int4-channel,attention=ternary,embedding=int8", config)
    plain = language_model_task(config, execution, BalanceConfig())
    task = fake.quantisation_aware(plain, config, schemes)
    params = jax.tree.map(lambda leaf: leaf * 4, initial_params(config))
    rounded = dequantised(fake.quantised(params, config, schemes))
    batch = random_batch(rows=2)
    changed = {path for path, leaf in trees.flatten(rounded).items() if not np.array_equal(leaf, _at(params, path))}
    assert changed == {path for path, record in by_path(config).items() if path in schemes}
    (loss, _), slopes = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch)
    (expected, _), wanted = jax.jit(jax.value_and_grad(plain.loss, has_aux=True))(rounded, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for path, slope in trees.flatten(slopes).items():
        target = np.asarray(_at(wanted, path))
        np.testing.assert_allclose(slope, target, rtol=1e-3, atol=1e-4 * np.abs(target).max(), err_msg=path)


def dequantised(params):
    """The arrays that products of quantised leaves stand for."""
    return trees.map_with_path(lambda _, leaf: leaf.dequantised() if is_quantised(leaf) else leaf, params)


def _at(tree, path):
    return trees.flatten(tree)[path]


def test_what_is_evaluated_is_what_is_saved(tmp_path):
    schemes = "ternary,feed_forward=int4-channel,attention=int8"
    run = run_config("dense", token_data(tmp_path), steps=6, ema_decay=0.5)
    summary = train(dataclasses.replace(run, qat=QATConfig(schemes)), tmp_path / "run")
    model = moe_reduce.load(tmp_path / "run/model", execution=EXECUTION)
    tokens, _ = prepare(run.data, model.config.vocab_size)
    found = job.quality(measure(model, validation_batches(tokens, run.data, 8, 2)))["validation"]
    assert found["loss"] == pytest.approx(summary["validation"]["loss"], rel=1e-5)
    line = metrics(tmp_path / "run", "validation")[-1]
    assert line["loss"] == pytest.approx(found["loss"], rel=1e-5)
    held = {path: leaf.scheme for path, leaf in trees.flatten(model.params).items() if is_quantised(leaf)}
    assert held == fake.parse(schemes, model.config)
    assert len({str(scheme) for scheme in held.values()}) == 3
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("schemes", "part"),
    [
        ("int3", "qat.schemes: scheme 'int3' is unknown"),
        ("experts=int8", "qat.schemes: the model has no component 'experts'; it has "),
        ("int4", "qat.schemes: int4.*: groups of .* do not divide the 16 inputs of embedding/table"),
        ("int8,attention=int4-g32", "groups of 32 do not divide the 16 inputs of"),
    ],
)
def test_schemes_that_do_not_fit(schemes, part):
    with pytest.raises(UserError, match=part) as raised:
        fake.parse(schemes, MODELS["dense"])
    assert "\n" not in str(raised.value)


def test_routers_stay_unless_they_are_named_and_adapters_have_no_masters():
    def components(schemes):
        return {by_path(MODELS["layer"])[path].component for path in fake.parse(schemes, MODELS["layer"])}

    assert components("int8") == {"attention", "embedding", "experts", "unembedding"}
    assert components("experts=keep,int8,router=int8") == {"attention", "embedding", "unembedding", "router"}
    assert components("experts=ternary") == {"experts"}
    assert components("") == set()
    with pytest.raises(UserError, match=r"qat\.schemes rounds what trains"):
        AdaptConfig(model="any", qat=QATConfig("int8"), train=TrainConfig(steps=1, batch_size=1)).check()
