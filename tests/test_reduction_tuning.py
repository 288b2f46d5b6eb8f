"""The losses that train a reduced model, by hand and at the points where they must be zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS, initial_params, random_batch

from moe_reduce.core import trees
from moe_reduce.core.config import BalanceConfig, ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.core.stages import PoolStage, TuneStage
from moe_reduce.models.model import Model
from moe_reduce.reduction import pool as pooling
from moe_reduce.runs.stages import annealing, recovery
from moe_reduce.training.distillation import mean_divergence
from moe_reduce.training.task import TEACHER

plain = functools.partial(PoolStage, canonical=False)
EXECUTION = ExecutionConfig(dispatch="reference").resolve("cpu")
CHAIN = (Step("pool", {}, (), 0, 0, kept_experts=[[[layer, index] for layer in range(2) for index in range(4)]]),)


@pytest.fixture
def model():
    params = trees.map_with_path(lambda _, leaf: leaf * 10 if leaf.ndim > 2 else leaf, initial_params(MODELS["layer"]))
    return Model(MODELS["layer"], params, EXECUTION)


def _loss(pooled, teacher, **settings):
    stage = TuneStage(steps=10, **settings)
    task = recovery.recovery_task(pooled, teacher.config, stage, BalanceConfig(weight=0.0))
    return task.loss({**pooled.params, TEACHER: teacher.params}, random_batch())


@pytest.mark.parametrize("router", ["shared", "layer"])
def test_concatenated_routers_have_nothing_to_learn_and_random_ones_do(model, router):
    """The router's loss says nothing about foreign experts, so it is zero for the concatenation."""
    concat = pooling.pool(model, plain(start="concat", router=router))
    loss, _ = _loss(concat, model, objective="router")
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    random, _ = _loss(pooling.pool(model, plain(start="random", router=router)), model, objective="router")
    assert float(random) > 1e-3


def test_router_divergence_by_hand(model):
    pooled = pooling.pool(model, plain(start="random"))
    found, _ = _loss(pooled, model, objective="router")
    batch = {"tokens": random_batch()["tokens"]}
    x = np.asarray(model.apply(batch, collect=("hidden",)).collected["hidden"]["router_input"], np.float64)
    wanted = np.asarray(model.params["layers"]["router"]["weight"], np.float64)
    pool = np.asarray(pooled.params["router"]["weight"], np.float64)

    def share(logits):
        return 1 / (1 + np.exp(-logits))

    totals = []
    for layer in range(2):
        p, q = share(x[layer] @ wanted[layer]), share(x[layer] @ pool[:, 4 * layer : 4 * layer + 4])
        totals.append(np.sum(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), axis=-1).mean())
    assert float(found) == pytest.approx(np.mean(totals), rel=1e-4)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(model):
    total, metrics = _loss(model, model, teacher_weight=1.0)
    assert float(total) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["teacher_divergence"]) == pytest.approx(0.0, abs=1e-5)
    half, metrics = _loss(model, model, teacher_weight=0.5)
    assert float(half) == pytest.approx(0.5 * float(metrics["loss"]), rel=1e-5)


def test_divergence_by_hand():
    wanted, found = (jax.random.normal(jax.random.key(seed), (2, 3, 7)) for seed in (0, 1))
    batch = {"weights": jnp.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])}
    p = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
    q = np.exp(found) / np.exp(found).sum(-1, keepdims=True)
    by_token = np.sum(p * np.log(p / q), axis=-1)
    expected = (by_token[0, 0] + by_token[0, 1] + by_token[1, 0]) / 3
    np.testing.assert_allclose(mean_divergence(wanted, found, batch), expected, rtol=1e-5)


def test_only_the_named_components_train():
    stage = TuneStage(steps=1, components="router,norm")
    trained = {
        path for path in trees.flatten(initial_params(MODELS["layer"])) if recovery.trains(stage, MODELS["layer"], path)
    }
    assert all("router" in path or "norm" in path for path in trained)
    assert "layers/router/weight" in trained
    assert "layers/attention/query_norm/scale" in trained
    bias = "layers/router_bias"
    annealing = dataclasses.replace(stage, components="norm", bias_from=1.0)
    assert recovery.trains(annealing, MODELS["pool"], bias)
    assert not recovery.trains(stage, MODELS["pool"], bias)


def test_foreign_experts_are_those_of_other_layers(model):
    pooled = dataclasses.replace(pooling.pool(model, plain()), chain=CHAIN)
    expected = np.repeat([[False, True], [True, False]], 4, axis=1)
    np.testing.assert_array_equal(annealing.foreign_experts(pooled.config, pooled.chain), expected)
    with pytest.raises(UserError, match="which layer"):
        annealing.foreign_experts(pooled.config, ())


def test_annealing_is_done_after_its_share_of_the_steps(model):
    pooled = dataclasses.replace(pooling.pool(model, plain()), chain=CHAIN)
    foreign = annealing.foreign_experts(pooled.config, pooled.chain)
    stage = TuneStage(steps=10, anneal_share=0.5, bias_from=4.0, bias_to=1.0)
    task = recovery.recovery_task(pooled, model.config, stage, BalanceConfig(), foreign)
    params = annealing.start_annealing(pooled, stage, foreign).params
    for wanted in (4.0, 3.4, 2.8, 2.2, 1.6, 1.0, 1.0, 1.0):
        np.testing.assert_allclose(params["layers"]["router_bias"], np.where(foreign, -wanted, 0.0), rtol=1e-5)
        params = task.after_step(params, {})
