"""Softmax attention that writes its scores to memory, for CPUs and platforms without a fused kernel."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.cache import SCALES, Layer, values
from moe_reduce.models.products import dot

# XLA on CPU runs a batched product on one core, and independent products in parallel. So tiles of queries use more
# cores; they also skip most of the masked scores.
TILES, SMALLEST_TILE = 4, 64
MASKED = -1e30


class Softmax(NamedTuple):
    """Settings of a softmax over keys: factor of the scores, a logit of each query head beside them, and a layout.

    scale: None: 1/√C. sinks_H: a logit that takes part in the softmax and has no value, so that a head can attend to
    nothing (arXiv:2309.17453); None: no such logit. layout: of the operands of products (models/products.py).
    """

    scale: float | None = None
    sinks_H: jax.Array | None = None
    layout: str = "plain"

    def scale_of(self, q: jax.Array) -> float:
        """Factor of the scores of queries of this width."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def sinks_of(self, groups: int) -> jax.Array | None:
        """Sinks by group of query heads, fp32 [G, R]."""
        return None if self.sinks_H is None else self.sinks_H.astype(jnp.float32).reshape(groups, -1)


PLAIN = Softmax()


def attention(q_BTHC, k_BTGC, v_BTGW, visibility: Visibility, softmax: Softmax = PLAIN, tiles: int = 1) -> jax.Array:
    """Softmax attention of a row's tokens to one another, [B, T, H, W]; query head h reads key/value head h·G/H.

    Values may have another width W than keys. tiles: maximum number of query tiles. A tile reads only the keys that it
    sees; with a causal mask, 4 tiles compute 5/8 of all products.
    """
    batch, time, heads, width = q_BTHC.shape
    groups = k_BTGC.shape[2]
    q_BGRTC = q_BTHC.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k_BGSC, v_BGSW = k_BTGC.transpose(0, 2, 1, 3), v_BTGW.transpose(0, 2, 1, 3)
    settings, sinks_GR = Settings(softmax.scale_of(q_BTHC), softmax.layout), softmax.sinks_of(groups)
    allowed_B1TT = visibility.within_rows(time)
    mixed = []
    for start, end in _tiles(time, tiles):
        # one product takes the R query heads of a group at all positions as rows, so keys and values are not repeated
        q_BGQC = q_BGRTC[:, :, :, start:end].reshape(batch, groups, -1, width)
        first, last = visibility.key_range(start, end)
        allowed_B1QS = allowed_B1TT[:, :, start:end, first:last]
        keys, values = k_BGSC[:, :, first:last], v_BGSW[:, :, first:last]
        part: Any = attend(q_BGQC, keys, values, allowed_B1QS, sinks_GR, settings)
        mixed.append(part.reshape(batch, heads, end - start, v_BTGW.shape[-1]))
    return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)


def _tiles(time: int, tiles: int) -> list[tuple[int, int]]:
    """(start, end) of each query tile. With tiles = 1, time may be symbolic, as in an export."""
    if tiles == 1:
        return [(0, time)]
    rows = max(SMALLEST_TILE, -(-time // tiles))
    return [(start, min(start + rows, time)) for start in range(0, time, rows)]


class Settings(NamedTuple):
    """Static settings of `attend`: factor of the scores, and layout of operands."""

    scale: float
    layout: str


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q_BGQC, k_BGSC, v_BGSW, allowed_B1QS, sinks_GR, settings: Settings) -> jax.Array:
    """softmax(settings.scale·q·kᵀ where allowed)·v for G groups, [B, G, Q, W]; scores and softmax in fp32.

    Axis Q of q_BGQC is (query head of the group, position), flattened; axis Q of allowed_B1QS is the position alone.
    sinks_GR: logits of each query head that take part in the softmax; None without them.
    """
    return _attend_forward(q_BGQC, k_BGSC, v_BGSW, allowed_B1QS, sinks_GR, settings)[0]


def _shares(scores_BGRQS: jax.Array, sinks_GR: jax.Array | None) -> jax.Array:
    """Softmax over the keys, and over the sinks where there are any."""
    if sinks_GR is None:
        return jax.nn.softmax(scores_BGRQS, axis=-1)
    sinks = jnp.broadcast_to(sinks_GR[None, :, :, None, None], (*scores_BGRQS.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores_BGRQS, sinks], axis=-1), axis=-1)[..., :-1]


def _attend_forward(q_BGQC, k_BGSC, v_BGSW, allowed_B1QS, sinks_GR, settings):
    scale, layout = settings
    batch, groups, queries, _ = q_BGQC.shape
    scores = dot(q_BGQC, k_BGSC, 1, 1, layout, batch=2) * scale
    scores = scores.reshape(batch, groups, -1, *allowed_B1QS.shape[2:])
    shares = _shares(jnp.where(allowed_B1QS[:, :, None], scores, jnp.float32(MASKED)), sinks_GR)
    left_BGRQ = None if sinks_GR is None else 1 - jnp.sum(shares, axis=-1)  # the sinks' shares
    shares_BGQS = shares.reshape(batch, groups, queries, -1).astype(v_BGSW.dtype)
    mixed_BGQW = dot(shares_BGQS, v_BGSW, 1, 0, layout, batch=2).astype(v_BGSW.dtype)
    return mixed_BGQW, (q_BGQC, k_BGSC, v_BGSW, shares_BGQS, mixed_BGQW, left_BGRQ)


def _attend_backward(settings, saved, dmixed_BGQW):
    scale, layout = settings
    q_BGQC, k_BGSC, v_BGSW, shares_BGQS, mixed_BGQW, left_BGRQ = saved
    dtype = q_BGQC.dtype
    dv_BGSW = dot(shares_BGQS, dmixed_BGQW, 0, 0, layout, batch=2).astype(dtype)
    dshares_BGQS = dot(dmixed_BGQW, v_BGSW, 1, 1, layout, batch=2)
    # Σ_s share · dshare is also dmixed · mixed, which sums over W instead of S
    mean_BGQ1 = jnp.sum(dmixed_BGQW.astype(jnp.float32) * mixed_BGQW.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = shares_BGQS.astype(jnp.float32) * (dshares_BGQS - mean_BGQ1) * scale
    dscores_BGQS = dscores.astype(dtype)
    dq_BGQC = dot(dscores_BGQS, k_BGSC, 1, 0, layout, batch=2).astype(dtype)
    dk_BGSC = dot(dscores_BGQS, q_BGQC, 0, 0, layout, batch=2).astype(dtype)
    dsinks_GR = None if left_BGRQ is None else -jnp.sum(left_BGRQ * mean_BGQ1.reshape(left_BGRQ.shape), axis=(0, 3))
    return dq_BGQC, dk_BGSC, dv_BGSW, None, dsinks_GR


attend.defvjp(_attend_forward, _attend_backward)


def cached_attention(q_BTHC, k_BTGC, v_BTGC, layer: Layer, allowed: jax.Array, softmax: Softmax = PLAIN) -> jax.Array:
    """Attention of T new tokens to the P entries of a cache and to one another, [B, T, H, C].

    Values may have another width than keys.

    allowed: [B, 1, 1, query T, key P + T], from `Visibility.with_cache`.
    """
    batch, time, heads, width = q_BTHC.shape
    groups, entries, layout = k_BTGC.shape[2], layer["keys"].shape[2], softmax.layout
    q_BGRTC = q_BTHC.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    q_BGQC = q_BGRTC.reshape(batch, groups, -1, width)
    k_BGTC, v_BGTC = k_BTGC.transpose(0, 2, 1, 3), v_BTGC.transpose(0, 2, 1, 3)
    old_BGQP = scaled(dot(q_BGQC, values(layer, "keys", q_BTHC.dtype), 1, 1, layout, batch=2), layer, "keys")
    scores = jnp.concatenate([old_BGQP, dot(q_BGQC, k_BGTC, 1, 1, layout, batch=2)], axis=-1) * softmax.scale_of(q_BTHC)
    scores = scores.reshape(batch, groups, -1, time, entries + time)
    shares = _shares(jnp.where(allowed, scores, jnp.float32(MASKED)), softmax.sinks_of(groups))
    old_BGQP, new_BGQT = jnp.split(shares.reshape(*q_BGQC.shape[:3], -1), [entries], axis=-1)
    old_BGQP = scaled(old_BGQP, layer, "values").astype(q_BTHC.dtype)
    mixed_BGQC = dot(old_BGQP, values(layer, "values", q_BTHC.dtype), 1, 0, layout, batch=2)
    mixed_BGQC = mixed_BGQC + dot(new_BGQT.astype(q_BTHC.dtype), v_BGTC, 1, 0, layout, batch=2)
    return mixed_BGQC.astype(q_BTHC.dtype).reshape(batch, heads, time, v_BTGC.shape[-1]).transpose(0, 2, 1, 3)


def scaled(values: jax.Array, layer: Layer, name: str, axis: int = 2) -> jax.Array:
    """Values with a scale for each cache entry, on all axes but `axis`, times that scale; as they are without scales.

    Products are scaled rather than the cache, because that would copy it.
    """
    if SCALES[name] not in layer:
        return values
    return values * jnp.expand_dims(layer[SCALES[name]], axis).astype(values.dtype)
