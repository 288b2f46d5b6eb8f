"""The gated delta rule in chunks, against a loop over tokens: outputs, states, gradients, documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.models.attention import delta_rule as rule
from moe_reduce.models.attention.delta_rule import Steps, delta_rule, unit_inverse

BATCH, HEADS, KEY, VALUE = 2, 3, 4, 5


def random_steps(time: int, seed: int = 0) -> Steps:
    rng = np.random.default_rng(seed)
    shape = (BATCH, time, HEADS)
    q, k = (rng.normal(size=(*shape, KEY)) for _ in range(2))
    k[:, 3:6] = k[:, 2:3]  # keys that repeat, for which a power series of the system is inaccurate
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(size=shape)
    decay = -rng.exponential(size=shape) * np.where(rng.uniform(size=shape) < 0.1, 50, 0.3)
    arrays = (q, k, rng.normal(size=(*shape, VALUE)), beta, decay)
    return Steps(*(jnp.asarray(array, jnp.float32) for array in arrays))


def by_token(steps: Steps, first: np.ndarray, starts: np.ndarray | None):
    """The rule as it is written, one token at a time, in fp64."""
    q, k, v, beta, decay = (np.asarray(x, np.float64) for x in steps)
    state, out = np.array(first, np.float64), np.zeros_like(v)
    for t in range(q.shape[1]):
        if starts is not None:
            state = np.where(starts[:, t, None, None, None], first, state)
        state = state * np.exp(decay[:, t])[..., None, None]
        wanted = v[:, t] - np.einsum("brc,brcw->brw", k[:, t], state)
        state = state + np.einsum("brc,brw->brcw", k[:, t], wanted * beta[:, t][..., None])
        out[:, t] = np.einsum("brc,brcw->brw", q[:, t], state)
    return out, state


@pytest.mark.parametrize("documents", [False, True])
def test_chunks_compute_what_a_loop_over_tokens_does(monkeypatch, documents: bool):
    monkeypatch.setattr(rule, "CHUNK", 8)
    time = 21  # two whole chunks and a part of one
    steps, rng = random_steps(time), np.random.default_rng(1)
    first = rng.normal(size=(BATCH, HEADS, KEY, VALUE)).astype(np.float32)
    starts = None
    if documents:
        starts = np.zeros((BATCH, time), bool)
        starts[0, [0, 3, 8, 13, 14]] = True  # at chunk bounds, within a chunk, and two in one
        starts[1, [0, 10]] = True
    out, state = jax.jit(delta_rule)(steps, first, starts)
    expected_out, expected_state = by_token(steps, first, starts)
    np.testing.assert_allclose(out, expected_out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(state, expected_state, rtol=2e-5, atol=2e-5)


def test_a_long_decay_leaves_gradients_finite(monkeypatch):
    monkeypatch.setattr(rule, "CHUNK", 8)
    steps = random_steps(16)._replace(decay_BTR=jnp.full((BATCH, 16, HEADS), -90.0))
    gradients = jax.jit(jax.grad(lambda steps: jnp.sum(delta_rule(steps, jnp.ones((BATCH, HEADS, KEY, VALUE)))[0])))(
        steps
    )
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradients)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_inverse_of_a_triangular_matrix_is_accurate_for_equal_keys(size: int):
    below = np.tril(np.ones((size, size)), -1)
    found = unit_inverse(jnp.asarray(below, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(size) + below), atol=1e-6)
