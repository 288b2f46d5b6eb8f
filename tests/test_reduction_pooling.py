"""Pooling is exact: canonical form and the lossless start leave the logits as they were."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.moe.routing import route
from moe_reduce.reduction import pool as pooling
from moe_reduce.reduction.canonical import canonical as canonical_form

plain = functools.partial(PoolStage, canonical=False)


@pytest.fixture
def model(tiny_layer_moe) -> Model:
    """Random, with norm scales and routers that are far from their start, so that folding them matters."""
    config = dataclasses.replace(tiny_layer_moe, init_std=0.3, layers=3)
    params = init_params(config, jax.random.key(0))
    scales = trees.select(params, "layers/mlp_norm/scale", expect=1)
    changed = {
        path: leaf * jnp.exp(0.5 * jax.random.normal(jax.random.key(5), leaf.shape)) for path, leaf in scales.items()
    }
    return Model(config, trees.update(params, changed), ExecutionConfig().resolve("cpu"))


def _tokens(model):
    return jax.random.randint(jax.random.key(1), (2, 24), 0, model.config.vocab_size)


def _relative(found, wanted):
    return float(jnp.max(jnp.abs(found - wanted)) / jnp.max(jnp.abs(wanted)))


def test_canonical_form_changes_the_parameters_and_not_the_logits(model):
    canonical = canonical_form(model)
    assert _relative(canonical(_tokens(model)), model(_tokens(model))) < 1e-5
    flat = trees.flatten(canonical.params)
    np.testing.assert_array_equal(flat["layers/mlp_norm/scale"], 1.0)
    gains = flat["layers/output_gain"]
    assert float(jnp.max(jnp.abs(gains - 1))) > 0.1
    # after it, every layer's experts have outputs of unit RMS on inputs of unit RMS
    again = canonical_form(canonical)
    np.testing.assert_allclose(trees.flatten(again.params)["layers/output_gain"], gains, rtol=1e-5)


def test_the_seed_of_a_pool_is_that_of_its_canonical_form(model):
    first, second = (pooling.pool(model, PoolStage(), seed).params["layers"]["output_gain"] for seed in (0, 1))
    wanted = canonical_form(model, 1).params["layers"]["output_gain"]
    np.testing.assert_array_equal(second, wanted)
    assert np.any(first != second)


@pytest.mark.parametrize("router", ["shared", "layer"])
@pytest.mark.parametrize("canonical", [True, False])
def test_lossless_start(model, router, canonical):
    pooled = pooling.pool(model, PoolStage(router=router, canonical=canonical))
    assert pooled.config.moe.experts == 12
    assert _relative(pooled(_tokens(model)), model(_tokens(model))) < 1e-5


def test_a_layer_short_of_experts_still_chooses_the_best_of_the_others(model):
    """What the bias of the lossless start adds to their logits rounds away less than tells them apart."""
    (bias_E, _) = jnp.asarray(pooling.foreign_bias((1, 2), pooling.LOSSLESS_BIAS))
    moe = dataclasses.replace(model.config.moe, experts=3, active=2)
    routing = route(jnp.array([[1.0, 20.0, 20.01], [-900.0, 900.0, 900.01]]), bias_E, moe)
    np.testing.assert_array_equal(routing.experts_SA, [[0, 2], [0, 2]])


def test_without_the_bias_other_layers_experts_compete(model):
    concat = pooling.pool(model, plain(start="concat"))
    assert _relative(concat(_tokens(model)), model(_tokens(model))) > 0.05
    weak = pooling.pool(model, plain(bias=0.5))
    assert _relative(weak(_tokens(model)), model(_tokens(model))) > 1e-3


def test_sigmoid_gates_approach_softmax_gates_with_the_offset(model):
    wanted = model(_tokens(model))
    errors = [
        _relative(pooling.pool(model, plain(score_function="sigmoid", offset=offset))(_tokens(model)), wanted)
        for offset in (4.0, 7.0, 10.0)
    ]
    for weaker, stronger in itertools.pairwise(errors):
        ratio = stronger / weaker
        assert 0.5 * np.exp(-3) < ratio < 2 * np.exp(-3), errors


def test_random_start_has_no_bias_and_a_router_of_its_own(model):
    pooled = pooling.pool(model, plain(start="random", score_function="sigmoid"))
    flat = trees.flatten(pooled.params)
    np.testing.assert_array_equal(flat["layers/router_bias"], 0.0)
    assert flat["router/weight"].shape == (16, 12)
    other = trees.flatten(pooling.pool(model, plain(start="random", score_function="sigmoid"), seed=1).params)
    assert not np.array_equal(other["router/weight"], flat["router/weight"])


def test_what_cannot_be_pooled(model, tiny_dense, tiny_shared):
    for config, part in ((tiny_dense, "dense"), (tiny_shared, "one pool already")):
        other = dataclasses.replace(model, config=config)
        with pytest.raises(UserError, match=part):
            pooling.pool(other, plain())
    moe = dataclasses.replace(model.config.moe, normalize=False)
    raw = dataclasses.replace(model, config=dataclasses.replace(model.config, moe=moe))
    with pytest.raises(UserError, match="norm_topk_prob"):
        pooling.pool(raw, plain(score_function="sigmoid"))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"bias": -1.0}, "bias=-1.0"),
        ({"bias": float("nan")}, "bias=nan"),
        ({"bias": float("inf")}, "bias=inf"),
        ({"bias": 4.0, "start": "random"}, "start=lossless"),
        ({"offset": 8.0}, "sigmoid scores"),
        ({"offset": float("nan"), "score_function": "sigmoid"}, "offset=nan"),
    ],
)
def test_options_that_mean_nothing(model, options, part):
    with pytest.raises(UserError, match=part):
        pooling.pool(model, plain(**options))


def test_pooling_needs_shapes_only(model):
    abstract = jax.eval_shape(
        lambda params: pooling.pool(dataclasses.replace(model, params=params), plain()).params, model.params
    )
    assert trees.flatten(abstract)["experts/gate"].shape == (12, 16, 24)
    assert trees.flatten(abstract)["layers/router_bias"].shape == (3, 12)
