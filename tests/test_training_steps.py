"""One step at a time: accumulation, average, schedule, decay, frozen leaves, and ways to compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import (
    MODELS,
    ONE_DEVICE,
    assert_close,
    initial_params,
    random_batch,
    run_config,
    step_function,
    unmeasured_peak,
)

from moe_reduce.core import trees
from moe_reduce.core.config import BalanceConfig, DataConfig, TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import abstract_params, by_path
from moe_reduce.training import optimizer, sharding
from moe_reduce.training.loop import Feed, Fit, Problem, Speed
from moe_reduce.training.losses import language_model_task
from moe_reduce.training.task import Task, join, partition

TRAIN = TrainConfig(steps=100, batch_size=8, learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10)


def a_run(kind, dispatch="reference", **train):
    run = run_config(kind, DataConfig(), **train)
    execution = dataclasses.replace(run.execution, dispatch=dispatch)
    return dataclasses.replace(run, execution=execution, balance=BalanceConfig(loss="none"))


def after(run, batches):
    step, state = step_function(run)
    for batch in batches:
        state, metrics = step(state, {}, batch)
    return state, metrics


@pytest.mark.parametrize(("kind", "masked"), [("dense", True), ("shared", False)])
def test_accumulation_changes_nothing(kind, masked):
    # Adam divides by |gradient| + epsilon: with 1e-8 a gradient that is zero but for rounding moves a whole step.
    # No balance loss: of a part it is another number than of the batch.
    batches = [random_batch(seed, masked=masked) for seed in range(3)]
    assert not masked or len({float(jnp.sum(batches[0]["weights"][part::4])) for part in range(4)}) == 4
    whole, one = after(a_run(kind, epsilon=1e-3), batches)
    parts, four = after(a_run(kind, epsilon=1e-3, accumulation=4), batches)
    np.testing.assert_allclose(one["loss"], four["loss"], rtol=1e-6)
    np.testing.assert_allclose(one["gradient_norm"], four["gradient_norm"], rtol=1e-5)
    assert_close(parts.params, whole.params, rtol=1e-5, atol=1e-7)


def test_average_is_the_exponential_one():
    step, state = step_function(a_run("dense", ema_decay=0.75))
    expected = trees.flatten(jax.tree.map(np.asarray, state.params))
    for seed in range(3):
        state, _ = step(state, {}, random_batch(seed))
        expected = {path: 0.75 * expected[path] + 0.25 * leaf for path, leaf in trees.flatten(state.params).items()}
    assert_close(state.average, trees.unflatten(expected), rtol=1e-5, atol=1e-8)
    assert not np.allclose(state.average["embedding"]["table"], state.params["embedding"]["table"], atol=1e-5)


def updates_of(tx, gradients, params):
    return jax.jit(lambda: tx.update(gradients, tx.init(params), params)[0])()


@pytest.mark.parametrize("kind", MODELS)
def test_weight_decay_spares_norms_biases_and_gains(kind):
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract_params(MODELS[kind]))
    tx = optimizer.build(dataclasses.replace(TRAIN, warmup_steps=0), params, by_path(MODELS[kind]))
    zeros = jax.tree.map(np.zeros_like, params)
    updates = updates_of(tx, zeros, params)
    for path, update in trees.flatten(updates).items():
        spared = path.endswith(("scale", "bias", "score_offset", "output_gain"))
        np.testing.assert_allclose(update, 0.0 if spared else -1e-2 * 0.1, rtol=1e-6, err_msg=path)


def test_weight_decay_knows_every_leaf():
    with pytest.raises(UserError, match="layers/mystery/matrix"):
        optimizer.decay_mask({"layers": {"mystery": {"matrix": jnp.ones((2, 2))}}}, by_path(MODELS["dense"]))


def test_learning_rate_at_its_corners():
    schedule = optimizer.learning_rate(TRAIN)
    for count, expected in {0: 0.0, 5: 5e-3, 10: 1e-2, 55: (1e-2 + 1e-3) / 2, 100: 1e-3}.items():
        assert float(schedule(count)) == pytest.approx(expected, rel=1e-5), count
    assert float(optimizer.learning_rate(dataclasses.replace(TRAIN, warmup_steps=0))(0)) == pytest.approx(1e-2)
    _, metrics = after(a_run("dense", steps=4, warmup_steps=0), [random_batch()])
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)


@pytest.mark.parametrize("kind", ["shared", "layer"])
def test_expert_learning_rate_scale(kind):
    params = initial_params(MODELS[kind])
    updates = []
    for scale in (1.0, 0.25):
        tx = optimizer.build(
            dataclasses.replace(TRAIN, warmup_steps=0, expert_learning_rate_scale=scale), params, by_path(MODELS[kind])
        )
        updates.append(trees.flatten(updates_of(tx, params, params)))
    for path, update in updates[0].items():
        factor = 0.25 if "experts/" in path else 1.0
        np.testing.assert_allclose(updates[1][path], factor * update, rtol=1e-6, err_msg=path)


def test_frozen_leaves_stay_and_have_no_optimiser_state(tmp_path):
    run = a_run("layer", steps=3, checkpoint_every=2)
    whole = language_model_task(run.model, run.execution.resolve("cpu"), run.balance)
    task = Task(whole.loss, whole.evaluate, whole.records, trainable=lambda path: "router" in path)
    params = initial_params(run.model)
    trained, frozen = partition(params, task.trainable)
    assert list(trees.flatten(trained)) == ["layers/router/weight"]
    assert_close(join(trained, frozen), params)
    before = jax.tree.map(np.array, params)
    mesh = sharding.make_mesh(dataclasses.replace(ONE_DEVICE, data=2))
    batch = {name: np.asarray(value) for name, value in random_batch().items()}
    problem, feed = Problem(task, trained, frozen, run.train), Feed(Repeated(batch), [batch], corpus="")
    fit = Fit(problem, feed, mesh, tmp_path, Speed(256, 1.0, unmeasured_peak()))
    moments = [leaf for leaf in jax.tree.leaves(fit._abstract.optimizer) if leaf.ndim]
    assert {leaf.shape for leaf in moments} == {trained["layers"]["router"]["weight"].shape}
    outcome = fit.run()
    assert list(trees.flatten(outcome.params)) == ["layers/router/weight"]
    assert np.abs(outcome.params["layers"]["router"]["weight"] - before["layers"]["router"]["weight"]).max() > 1e-3
    assert_close(fit.frozen, partition(before, task.trainable)[1])


class Repeated:
    """The same batch for ever, with the position of a grain iterator."""

    def __init__(self, batch):
        self.batch, self.done = batch, 0

    def __next__(self):
        self.done += 1
        return self.batch

    def get_state(self):
        return {"done": self.done}

    def set_state(self, state):
        self.done = state["done"]


def loss_and_gradient(run):
    task = language_model_task(run.model, run.execution.resolve("cpu"), run.balance)
    params = initial_params(run.model)
    (loss, _), gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, random_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    return float(loss), float(optax.tree.norm(gradient))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("shared", {"remat": "full"}),
        ("dense", {"remat": "dots"}),
        ("dense", {"remat": "full", "scan_unroll": 2}),
    ],
)
def test_remat_and_unrolling_compute_the_same(kind, changes):
    run = a_run(kind, "blocks")
    other = dataclasses.replace(run, execution=dataclasses.replace(run.execution, **changes))
    np.testing.assert_allclose(loss_and_gradient(other), loss_and_gradient(run), rtol=1e-6)


def test_bfloat16_computes_nearly_the_same_on_fp32_masters():
    run = a_run("shared", "blocks", warmup_steps=0)
    half = dataclasses.replace(run, execution=dataclasses.replace(run.execution, compute_dtype="bfloat16"))
    (_, full_metrics), (state, metrics) = after(run, [random_batch()]), after(half, [random_batch()])
    assert float(metrics["loss"]) != float(full_metrics["loss"])
    np.testing.assert_allclose(metrics["loss"], full_metrics["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["gradient_norm"], full_metrics["gradient_norm"], rtol=3e-2)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
