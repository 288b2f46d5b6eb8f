"""Adapters and gradients of GPT-NeoX shapes: biases come behind an adapter's change, and bf16 rounds no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.attention.rotary import angles, rotate
from moe_reduce.models.decoder import AttentionHalf, Decoder, init_params
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.norms import LayerNorm

EXECUTION = ExecutionConfig().resolve("cpu")
RANK = 3


@pytest.fixture
def params(tiny_neox):
    """Every leaf random: biases start from zero, where they could not be missed."""
    flat = trees.flatten(init_params(tiny_neox, jax.random.key(0)))
    drawn = {path: 0.3 * jax.random.normal(jax.random.key(i), x.shape) for i, (path, x) in enumerate(flat.items())}
    return trees.unflatten(drawn)


def tokens_of(config):
    return jax.random.randint(jax.random.key(0), (2, 12), 0, config.vocab_size)


def logits(config, variables):
    return jax.jit(Decoder(config, EXECUTION).apply)(variables, tokens_of(config))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("path", ["attention/query", "attention/value", "attention/output", "mlp/up", "mlp/down"])
def test_an_adapter_equals_its_product_added_to_the_matrix(tiny_neox, params, path, dora):
    matrix = trees.flatten(params)[f"layers/{path}"]
    inputs = 2 if path.endswith("output") else 1
    flat = matrix.reshape(matrix.shape[0], int(np.prod(matrix.shape[1 : 1 + inputs])), -1)
    inward = 0.3 * jax.random.normal(jax.random.key(1), (*flat.shape[:2], RANK))
    outward = 0.3 * jax.random.normal(jax.random.key(2), (flat.shape[0], RANK, flat.shape[2]))
    delta = {"in": {"matrix": inward}, "out": {"matrix": outward}, "scale": jnp.full(2, 0.5)}
    changed = flat + 0.5 * jnp.einsum("NIK,NKO->NIO", inward, outward)
    if dora:
        magnitude_NO = jnp.abs(jax.random.normal(jax.random.key(3), (2, flat.shape[2])))
        delta |= {"magnitude": magnitude_NO, "present": jnp.ones(2)}
        changed = changed * (magnitude_NO[:, None] / jnp.linalg.norm(changed, axis=1, keepdims=True))
    merged = trees.update(params, {f"layers/{path}": changed.reshape(matrix.shape)})
    expected = logits(tiny_neox, {"params": merged})
    adapted = logits(tiny_neox, {"params": params, ADAPTER: trees.unflatten({f"layers/{path}": delta})})
    np.testing.assert_allclose(adapted, expected, atol=2e-5 * jnp.abs(expected).max())
    assert jnp.abs(expected - logits(tiny_neox, {"params": params})).max() > 1e-2 * jnp.abs(expected).max()


def test_the_half_block_is_the_block_without_its_feed_forward(tiny_neox, params):
    """With a silent feed-forward, what the block leaves is what the half gives; its norm reads the block's input."""
    silent = {path: jnp.zeros_like(leaf) for path, leaf in trees.flatten(params).items() if "mlp/down" in path}
    params = trees.update(params, silent)
    model = Model(tiny_neox, params, EXECUTION)
    hidden = jax.jit(lambda: model.apply({"tokens": tokens_of(tiny_neox)}, collect=("hidden",)))().collected["hidden"]
    layer = {name: jax.tree.map(lambda leaf: leaf[1], params["layers"][name]) for name in params["layers"]}
    layer.pop("mlp")
    positions_BT = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    x_BTD = hidden["block_input"][1]
    attended, normed = AttentionHalf(tiny_neox, EXECUTION).apply({"params": layer}, x_BTD, positions_BT)
    np.testing.assert_allclose(attended, hidden["block_output"][1], atol=1e-5)
    expected = LayerNorm(tiny_neox).apply({"params": layer["mlp_norm"]}, x_BTD)
    np.testing.assert_allclose(normed, expected, atol=1e-5)


def test_gradients_of_biases_are_sums_in_fp32(tiny_neox, params):
    """Over 4,096 tokens a sum in bf16 would stop growing at 256 times its terms."""
    half = ExecutionConfig(compute_dtype="bfloat16").resolve("cpu")
    ids = jnp.zeros((8, 512), jnp.int32)  # the same everywhere: all terms are alike

    def gradient(execution):
        def loss(params):
            return jnp.sum(jnp.square(Decoder(tiny_neox, execution).apply({"params": params}, ids)))

        return jax.jit(jax.grad(loss))(params)["layers"]

    whole, rounded = gradient(EXECUTION), gradient(half)
    for part, name in (("mlp", "down_bias"), ("attention", "output_bias"), ("mlp_norm", "bias")):
        expected = np.asarray(whole[part][name])
        np.testing.assert_allclose(rounded[part][name], expected, atol=0.05 * np.abs(expected).max(), err_msg=name)


def test_only_the_start_of_a_head_turns():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16))
    positions = jnp.arange(5)[None] + 3
    turned = rotate(x, angles(positions, 4, 1e4))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], angles(positions, 4, 1e4)))
    assert jnp.abs(turned[..., :4] - x[..., :4]).max() > 0.1
