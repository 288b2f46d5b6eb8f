"""Balancing on cases small enough to compute by hand."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_reduce.core.config import BalanceConfig, ExecutionConfig, MoEConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.training.losses import (
    balance_terms,
    collapse,
    evaluator,
    mean_nll,
    move_bias,
    negative_log_likelihood,
    predict,
)
from moe_reduce.training.validation import Mean, added, summarize


def moe(placement, active=2):
    return MoEConfig(active=active, placement=placement)


def routing(counts, probability):
    zeros = jnp.zeros(len(counts))
    return {"counts_E": jnp.array(counts), "probability_E": jnp.array(probability), "z": zeros + 4.0, "dropped": zeros}


def test_pooled_lets_layers_specialise_and_per_call_does_not():
    one_expert_a_layer = routing([[8.0, 0.0], [0.0, 8.0]], [[0.75, 0.25], [0.25, 0.75]])
    _, metrics = balance_terms(one_expert_a_layer, BalanceConfig(), moe("shared", active=1))
    assert float(metrics["balance_pooled"]) == pytest.approx(2 * (0.5 * 0.5 + 0.5 * 0.5))
    assert float(metrics["balance_per_call"]) == pytest.approx(2 * 0.75)


@pytest.mark.parametrize(("loss", "expected"), [("none", 0.0), ("pooled", 2 * 0.75), ("per_call", 2 * 0.75)])
def test_penalty_is_weighted(loss, expected):
    collapsed = routing([[8.0, 0.0], [8.0, 0.0]], [[0.75, 0.25], [0.75, 0.25]])
    balance = BalanceConfig(loss=loss, weight=0.1, z_loss_weight=0.01)
    penalty, _ = balance_terms(collapsed, balance, moe("shared", active=1))
    assert float(penalty) == pytest.approx(0.1 * expected + 0.01 * 4.0)


def test_evenness_is_of_a_pool_as_a_whole_and_of_each_layers_own_experts():
    # each of two layers uses two of forty experts evenly: 0.1 of the mean is 1 assignment of 400
    counts = np.zeros((2, 40))
    counts[0, :2] = counts[1, 2:4] = 200.0
    counts[0, 4] = 0.5
    both = routing(counts.tolist(), (np.ones((2, 40)) / 40).tolist())
    _, pool = balance_terms(both, BalanceConfig(), moe("shared"))
    _, layers = balance_terms(both, BalanceConfig(), moe("layer"))
    assert float(pool["expert_entropy"]) == pytest.approx(np.log(4 / 2) / np.log(40 / 2), abs=1e-2)
    assert float(layers["expert_entropy"]) == pytest.approx(0.0, abs=1e-2)
    assert float(pool["dead_expert_share"]) == pytest.approx(36 / 40)
    assert float(layers["dead_expert_share"]) == pytest.approx(38 / 40)


@pytest.mark.parametrize("placement", ["layer", "shared"])
def test_entropy_is_0_where_all_choose_the_same_and_1_where_all_are_used_evenly(placement):
    counts = {"same": [[8.0, 8.0, 0.0, 0.0, 0.0]] * 2, "even": [[4.0] * 5] * 2, "all": [[8.0, 8.0]] * 2}
    found = {
        name: balance_terms(routing(rows, rows), BalanceConfig(), moe(placement))[1]["expert_entropy"]
        for name, rows in counts.items()
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"same": 0.0, "even": 1.0, "all": 1.0}, abs=1e-6
    )


def test_collapse_says_what_went_under_its_floor():
    even = {"expert_entropy": 0.9, "dead_expert_share": 0.1}
    assert collapse(BalanceConfig(entropy_floor=0.5, dead_share_limit=0.5), even) is None
    assert "entropy_floor" in str(collapse(BalanceConfig(entropy_floor=0.95), even))
    assert "dead_share_limit" in str(collapse(BalanceConfig(dead_share_limit=0.05), even))


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("per_call", [[-0.5, 0.5, 0.0], [-0.5, 0.5, 0.5]]), ("pooled", [[-0.5, 0.5, 0.5], [-0.5, 0.5, 0.5]])],
)
def test_bias_rises_where_an_expert_is_used_too_little(scope, expected):
    counts_NE = jnp.array([[6.0, 2.0, 4.0], [12.0, 0.0, 0.0]])
    params = {"layers": {"router_bias": jnp.zeros((2, 3)), "other": jnp.ones(1)}}
    moved = move_bias(params, counts_NE, BalanceConfig(bias_rate=0.5, bias_scope=scope))
    np.testing.assert_array_equal(moved["layers"]["router_bias"], expected)
    np.testing.assert_array_equal(params["layers"]["router_bias"], 0.0)


def test_only_counted_targets_count():
    logits_BTV = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    batch = {"targets": jnp.array([[0, 1, 1]]), "weights": jnp.array([[1.0, 1.0, 0.0]])}
    assert float(mean_nll(logits_BTV, batch)) == pytest.approx(-np.log(0.5 * 0.75) / 2)
    nothing = batch | {"weights": jnp.zeros((1, 3))}
    assert float(mean_nll(logits_BTV, nothing)) == 0.0


def test_the_gradient_of_the_likelihood_is_that_of_its_formula():
    logits_BTV, targets_BT = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 4, jnp.arange(15).reshape(3, 5) % 7
    weights_BT = (jnp.arange(15).reshape(3, 5) % 3).astype(jnp.float32)  # some of them 0

    def total(nll):
        return jax.value_and_grad(lambda logits: jnp.sum(nll(logits, targets_BT) * weights_BT))(logits_BTV)

    found, wanted = total(negative_log_likelihood), total(optax.softmax_cross_entropy_with_integer_labels)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_what_fills_up_a_row_or_a_batch_does_not_count_in_routing(tiny_shared, dispatch):
    execution = ExecutionConfig(platform="cpu", dispatch=dispatch, capacity_factor=float(tiny_shared.moe.experts))
    skeleton, params = Model(tiny_shared, {}, execution), init_params(tiny_shared, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, tiny_shared.vocab_size, (4, 16)).astype(np.int32)
    counted = np.ones((4, 16), np.float32)
    counted[:, :4] = 0  # a prompt, which is read though it is not learned
    small = {"tokens": tokens, "targets": tokens, "weights": counted}
    large = {name: np.pad(array, ((0, 4), (0, 48))) for name, array in small.items()}

    def figures(batch):
        _, penalty, metrics = predict(
            skeleton.with_params(params), BalanceConfig(loss="pooled", z_loss_weight=0.01), batch
        )
        return {"penalty": penalty} | metrics | {"counts_NE": evaluator(skeleton)(params, batch)["counts_NE"]}

    found, wanted = figures(large), figures(small)
    assert np.sum(wanted["counts_NE"]) == tiny_shared.layers * tokens.size * tiny_shared.moe.active
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_padding_takes_no_capacity_from_real_tokens(tiny_shared):
    moe = dataclasses.replace(tiny_shared.moe, active=1)
    config = dataclasses.replace(tiny_shared, moe=moe)
    skeleton = Model(config, {}, ExecutionConfig(platform="cpu", dispatch="capacity", capacity_factor=1.0))
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (1, 64)).astype(np.int32)
    weights = np.ones((1, 64), np.float32)
    padded = {"tokens": np.concatenate([np.zeros_like(tokens)] * 3 + [tokens]), "targets": np.tile(tokens, (4, 1))}
    padded["weights"] = np.concatenate([np.zeros_like(weights)] * 3 + [weights])
    _, _, metrics = predict(skeleton.with_params(params), BalanceConfig(), padded)
    assert metrics["dropped_share"] == 0  # room for 256 / E of each, of 64


def test_every_mean_has_its_own_denominator():
    batches = [
        {"loss": Mean(6.0, 4.0), "accuracy": Mean(1.0, 4.0), "entropy": Mean(3.0, 10.0), "counts_NE": np.ones((2, 3))},
        {"loss": Mean(2.0, 4.0), "accuracy": Mean(3.0, 4.0), "entropy": Mean(9.0, 20.0), "counts_NE": np.ones((2, 3))},
    ]
    found = summarize(added(batches))
    assert list(found)[:2] == ["loss", "perplexity"]
    assert found.pop("counts_NE").tolist() == [[2.0] * 3] * 2
    assert found == {"loss": 1.0, "perplexity": math.e, "accuracy": 0.5, "entropy": 0.4}


def test_scalars_that_are_no_means_are_added_and_nothing_divides_by_zero():
    found = summarize(added([{"loss": Mean(0.0, 0.0), "tokens": np.float32(2)}] * 3))
    assert found == {"loss": 0.0, "perplexity": 1.0, "tokens": 6.0}
    assert all(isinstance(value, float) for value in found.values())
    assert summarize({"loss": Mean(800.0, 1.0)})["perplexity"] == math.inf
    assert math.isnan(summarize({"loss": Mean(math.nan, 1.0)})["perplexity"])
