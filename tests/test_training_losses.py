"""Balancing on cases small enough to compute by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.config import BalanceConfig
from moe_reduce.training.losses import balance_terms, mean_nll, move_bias


def routing(counts, probability):
    zeros = jnp.zeros(len(counts))
    return {"counts_E": jnp.array(counts), "probability_E": jnp.array(probability), "z": zeros + 4.0, "dropped": zeros}


def test_pooled_lets_layers_specialise_and_per_call_does_not():
    one_expert_a_layer = routing([[8.0, 0.0], [0.0, 8.0]], [[0.75, 0.25], [0.25, 0.75]])
    _, metrics = balance_terms(one_expert_a_layer, BalanceConfig(), shared_pool=True)
    assert float(metrics["balance_pooled"]) == pytest.approx(2 * (0.5 * 0.5 + 0.5 * 0.5))
    assert float(metrics["balance_per_call"]) == pytest.approx(2 * 0.75)


@pytest.mark.parametrize(("loss", "expected"), [("none", 0.0), ("pooled", 2 * 0.75), ("per_call", 2 * 0.75)])
def test_penalty_is_weighted(loss, expected):
    collapsed = routing([[8.0, 0.0], [8.0, 0.0]], [[0.75, 0.25], [0.75, 0.25]])
    penalty, _ = balance_terms(collapsed, BalanceConfig(loss=loss, weight=0.1, z_loss_weight=0.01), shared_pool=True)
    assert float(penalty) == pytest.approx(0.1 * expected + 0.01 * 4.0)


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
