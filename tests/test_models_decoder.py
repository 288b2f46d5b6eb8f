"""Causality, document masks, placements that must agree, and that nothing depends on how a model is executed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.decoder import Decoder, init_params
from moe_reduce.models.embedding import Embedding

EXECUTION = ExecutionConfig(dispatch="blocks", block_rows=4)


def _logits(config, params, tokens, execution=EXECUTION, **inputs):
    return jax.jit(lambda params, tokens: Decoder(config, execution).apply({"params": params}, tokens, **inputs))(
        params, tokens
    )


def _tokens(config, batch=2, time=12, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, time), 0, config.vocab_size)


@pytest.fixture(params=["tiny_dense", "tiny_neox", "tiny_shared", "tiny_layer_moe"])
def config(request):
    return request.getfixturevalue(request.param)


def test_the_future_changes_nothing(config):
    params = init_params(config, jax.random.key(0))
    tokens = _tokens(config)
    changed = tokens.at[:, 8:].set((tokens[:, 8:] + 1) % config.vocab_size)
    before, after = _logits(config, params, tokens), _logits(config, params, changed)
    np.testing.assert_allclose(before[:, :8], after[:, :8], atol=1e-5)
    assert jnp.max(jnp.abs(before[:, 8:] - after[:, 8:])) > 1e-3


def test_documents_in_one_row_are_as_if_alone(config):
    params = init_params(config, jax.random.key(0))
    first, second = _tokens(config, 1, 5), _tokens(config, 1, 7, seed=1)
    segments = jnp.array([[1] * 5 + [2] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    packed = _logits(config, params, jnp.concatenate([first, second], 1), segments=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :5], _logits(config, params, first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], _logits(config, params, second), atol=1e-5)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(dispatch="ragged", scan_unroll=2),
        ExecutionConfig(dispatch="reference", remat="full"),
        ExecutionConfig(dispatch="blocks", remat="dots", block_rows=64),
    ],
)
def test_execution_does_not_change_the_model(tiny_shared, execution):
    params = init_params(tiny_shared, jax.random.key(0))
    tokens = _tokens(tiny_shared)
    expected = _logits(tiny_shared, params, tokens)
    np.testing.assert_allclose(_logits(tiny_shared, params, tokens, execution), expected, atol=1e-5)


def test_bfloat16_is_near_and_logits_stay_float32(config):
    params = init_params(config, jax.random.key(0))
    tokens = _tokens(config)
    execution = dataclasses.replace(EXECUTION, compute_dtype="bfloat16")
    half = _logits(config, params, tokens, execution)
    whole = _logits(config, params, tokens)
    assert half.dtype == jnp.float32
    assert jnp.max(jnp.abs(half - whole)) < 0.05 * jnp.max(jnp.abs(whole)) + 0.02
    assert not jnp.array_equal(half, whole)


def test_a_shared_pool_is_a_layer_pool_repeated(tiny_shared):
    shared = init_params(tiny_shared, jax.random.key(0))
    moe = dataclasses.replace(tiny_shared.moe, placement="layer", router="layer")
    by_layer = dataclasses.replace(tiny_shared, moe=moe)
    flat = trees.flatten(shared)
    copies = {
        f"layers/{path}" if path.startswith(("experts", "router/")) else path: jnp.broadcast_to(
            leaf[None], (tiny_shared.layers, *leaf.shape)
        )
        if path.startswith(("experts", "router/"))
        else leaf
        for path, leaf in flat.items()
    }
    tokens = _tokens(tiny_shared)
    np.testing.assert_allclose(
        _logits(by_layer, trees.unflatten(copies), tokens), _logits(tiny_shared, shared, tokens), atol=1e-5
    )


def test_factorised_embedding_is_its_product(tiny_shared):
    params = init_params(tiny_shared, jax.random.key(0))
    whole = {path: leaf for path, leaf in trees.flatten(params).items() if not path.startswith("embedding")}
    whole["embedding/table"] = params["embedding"]["factor"] @ params["embedding"]["projection"]
    config = dataclasses.replace(tiny_shared, embedding_factor=None)
    tokens = _tokens(tiny_shared)
    np.testing.assert_allclose(
        _logits(config, trees.unflatten(whole), tokens), _logits(tiny_shared, params, tokens), atol=1e-4
    )


def test_output_gain_scales_what_experts_add(tiny_shared):
    moe = dataclasses.replace(tiny_shared.moe, output_gain=True)
    config = dataclasses.replace(tiny_shared, moe=moe)
    params = init_params(config, jax.random.key(0))
    flat = trees.flatten(params)
    halved = trees.update(
        params, {"layers/output_gain": flat["layers/output_gain"] * 0.5, "experts/down": flat["experts/down"] * 2.0}
    )
    tokens = _tokens(config)
    np.testing.assert_allclose(_logits(config, halved, tokens), _logits(config, params, tokens), atol=1e-5)


@pytest.mark.parametrize("factor", [None, 16])
def test_the_gradient_of_a_frequent_token_adds_up_in_fp32(tiny_dense, factor):
    """A sum of equal terms in bf16 stops growing behind 256 of them."""
    config = dataclasses.replace(tiny_dense, embedding_factor=factor)
    embedding = {dtype: Embedding(config, ExecutionConfig(compute_dtype=dtype)) for dtype in ("float32", "bfloat16")}
    tokens_BT = jnp.zeros((4, 1024), jnp.int32)
    weight_BTD = 1 + jax.random.uniform(jax.random.key(1), (*tokens_BT.shape, config.width))
    params = embedding["float32"].init(jax.random.key(0), tokens_BT, method="encode")

    def gradient(dtype):
        def total(params):
            encoded: Any = embedding[dtype].apply(params, tokens_BT, method="encode")
            return jnp.sum(encoded.astype(jnp.float32) * weight_BTD)

        (name,) = {"table", "factor"} & set(params["params"])
        return jax.grad(total)(params)["params"][name][0]

    exact = gradient("float32")
    assert jnp.linalg.norm(gradient("bfloat16") - exact) < 0.01 * jnp.linalg.norm(exact)
