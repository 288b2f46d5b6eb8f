"""Softmax attention that writes its scores to memory, for CPUs and platforms without a fused kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.cache import SCALES, Layer, values
from moe_reduce.models.products import dot

# XLA on CPU runs a batched product on one core, and independent products in parallel. So tiles of queries use more
# cores; they also skip most of the masked scores.
TILES, SMALLEST_TILE = 4, 64
MASKED = -1e30


def attention(q_BTHC, k_BTGC, v_BTGC, visibility: Visibility, layout: str = "plain", tiles: int = 1) -> jax.Array:
    """Softmax attention of a row's tokens to one another, [B, T, H, C]; query head h reads key/value head h·G/H.

    tiles: maximum number of query tiles. A tile reads only the keys that it sees; with a causal mask, 4 tiles compute
    5/8 of all products.
    """
    batch, time, heads, width = q_BTHC.shape
    groups = k_BTGC.shape[2]
    q_BGRTC = q_BTHC.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k_BGSC, v_BGSC = k_BTGC.transpose(0, 2, 1, 3), v_BTGC.transpose(0, 2, 1, 3)
    allowed_B1TT = visibility.within_rows(time)
    mixed = []
    for start, end in _tiles(time, tiles):
        # one product takes the R query heads of a group at all positions as rows, so keys and values are not repeated
        q_BGQC = q_BGRTC[:, :, :, start:end].reshape(batch, groups, -1, width)
        first, last = visibility.key_range(start, end)
        allowed_B1QS = allowed_B1TT[:, :, start:end, first:last]
        part: Any = attend(q_BGQC, k_BGSC[:, :, first:last], v_BGSC[:, :, first:last], allowed_B1QS, layout)
        mixed.append(part.reshape(batch, heads, end - start, width))
    return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)


def _tiles(time: int, tiles: int) -> list[tuple[int, int]]:
    """(start, end) of each query tile. With tiles = 1, time may be symbolic, as in an export."""
    if tiles == 1:
        return [(0, time)]
    rows = max(SMALLEST_TILE, -(-time // tiles))
    return [(start, min(start + rows, time)) for start in range(0, time, rows)]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BGQC, k_BGSC, v_BGSC, allowed_B1QS, layout: str = "plain") -> jax.Array:
    """softmax(q·kᵀ/√C where allowed)·v for G groups, [B, G, Q, C]; scores and softmax in fp32.

    Axis Q of q_BGQC is (query head of the group, position), flattened; axis Q of allowed_B1QS is the position alone.
    """
    return _attend_forward(q_BGQC, k_BGSC, v_BGSC, allowed_B1QS, layout)[0]


def _attend_forward(q_BGQC, k_BGSC, v_BGSC, allowed_B1QS, layout):
    batch, groups, queries, width = q_BGQC.shape
    scores = dot(q_BGQC, k_BGSC, 1, 1, layout, batch=2) * width**-0.5
    scores = scores.reshape(batch, groups, -1, *allowed_B1QS.shape[2:])
    shares = jax.nn.softmax(jnp.where(allowed_B1QS[:, :, None], scores, jnp.float32(MASKED)), axis=-1)
    shares_BGQS = shares.reshape(batch, groups, queries, -1).astype(v_BGSC.dtype)
    mixed_BGQC = dot(shares_BGQS, v_BGSC, 1, 0, layout, batch=2).astype(v_BGSC.dtype)
    return mixed_BGQC, (q_BGQC, k_BGSC, v_BGSC, shares_BGQS, mixed_BGQC)


def _attend_backward(layout, saved, dmixed_BGQC):
    q_BGQC, k_BGSC, v_BGSC, shares_BGQS, mixed_BGQC = saved
    dtype = q_BGQC.dtype
    dv_BGSC = dot(shares_BGQS, dmixed_BGQC, 0, 0, layout, batch=2).astype(dtype)
    dshares_BGQS = dot(dmixed_BGQC, v_BGSC, 1, 1, layout, batch=2)
    # Σ_s share · dshare is also dmixed · mixed, which sums over C instead of S
    mean_BGQ1 = jnp.sum(dmixed_BGQC.astype(jnp.float32) * mixed_BGQC.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = shares_BGQS.astype(jnp.float32) * (dshares_BGQS - mean_BGQ1) * q_BGQC.shape[-1] ** -0.5
    dscores_BGQS = dscores.astype(dtype)
    dq_BGQC = dot(dscores_BGQS, k_BGSC, 1, 0, layout, batch=2).astype(dtype)
    dk_BGSC = dot(dscores_BGQS, q_BGQC, 0, 0, layout, batch=2).astype(dtype)
    return dq_BGQC, dk_BGSC, dv_BGSC, None


attend.defvjp(_attend_forward, _attend_backward)


def cached_attention(q_BTHC, k_BTGC, v_BTGC, layer: Layer, allowed: jax.Array, layout: str) -> jax.Array:
    """Attention of T new tokens to the P entries of a cache and to one another, [B, T, H, C].

    allowed: [B, 1, 1, query T, key P + T], from `Visibility.with_cache`.
    """
    batch, time, heads, width = q_BTHC.shape
    groups, entries = k_BTGC.shape[2], layer["keys"].shape[2]
    q_BGRTC = q_BTHC.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    q_BGQC = q_BGRTC.reshape(batch, groups, -1, width)
    k_BGTC, v_BGTC = k_BTGC.transpose(0, 2, 1, 3), v_BTGC.transpose(0, 2, 1, 3)
    old_BGQP = _scaled(dot(q_BGQC, values(layer, "keys", q_BTHC.dtype), 1, 1, layout, batch=2), layer, "keys")
    scores = jnp.concatenate([old_BGQP, dot(q_BGQC, k_BGTC, 1, 1, layout, batch=2)], axis=-1) * width**-0.5
    scores = scores.reshape(batch, groups, -1, time, entries + time)
    shares = jax.nn.softmax(jnp.where(allowed, scores, jnp.float32(MASKED)), axis=-1)
    old_BGQP, new_BGQT = jnp.split(shares.reshape(*q_BGQC.shape[:3], -1), [entries], axis=-1)
    old_BGQP = _scaled(old_BGQP, layer, "values").astype(q_BTHC.dtype)
    mixed_BGQC = dot(old_BGQP, values(layer, "values", q_BTHC.dtype), 1, 0, layout, batch=2)
    mixed_BGQC = mixed_BGQC + dot(new_BGQT.astype(q_BTHC.dtype), v_BGTC, 1, 0, layout, batch=2)
    return mixed_BGQC.astype(q_BTHC.dtype).reshape(batch, heads, time, width).transpose(0, 2, 1, 3)


def _scaled(products_BGQP: jax.Array, layer: Layer, name: str) -> jax.Array:
    """Products times the scale of each cache entry. Products are scaled, because scaling the cache would copy it."""
    return products_BGQP * layer[SCALES[name]][:, :, None] if SCALES[name] in layer else products_BGQP
