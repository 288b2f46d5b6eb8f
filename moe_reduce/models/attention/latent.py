"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made of one vector for each token.

The cache holds that vector, in the place of values, and the rotated part of the key that all heads share, in the place
of keys. With a cache, queries are mapped to the vector's space, so that keys and values of old tokens are never formed.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.attention_config import LatentAttention as Widths
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import cache
from moe_reduce.models.attention.attention import Windowed, self_attention
from moe_reduce.models.attention.rotary import angles_of, rotate
from moe_reduce.models.attention.softmax import MASKED, Softmax, cached_attention, scaled
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.collect import sow
from moe_reduce.models.norms import RMSNorm
from moe_reduce.models.products import dot
from moe_reduce.models.weights import dequantised, linear, weight

EPSILON = 1e-6  # of the norms within, whatever the model's norm_epsilon


class Inputs(NamedTuple):
    """Queries without and with rotation [B, T, H, ·], latent vectors [B, T, L], and rotated keys [B, T, 1, ·]."""

    plain_BTHC: jax.Array
    turned_BTHC: jax.Array
    latent_BTL: jax.Array
    key_BT1C: jax.Array

    @property
    def q_BTHC(self) -> jax.Array:
        """Whole queries."""
        return jnp.concatenate([self.plain_BTHC, self.turned_BTHC], axis=-1)


class LatentAttention(nn.Module):
    """Latent attention of a row's tokens to one another and, with a cache, to its entries."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, windowed: Windowed = None
    ) -> jax.Array:
        del windowed  # ModelConfig.check refuses a window
        inputs, up = self._inputs(x_BTD, positions_BT), weight(self, "latent_up")
        sow(self, cache.KEYS_VALUES, {"keys": inputs.key_BT1C, "values": inputs.latent_BTL[:, :, None]})
        past, visibility = cache.layer_of(self), Visibility(self.config, segments_BT)
        if past is None:
            k_BTHC, v_BTHW = self._expanded(inputs.latent_BTL, inputs.key_BT1C)
            mixed = self_attention(inputs.q_BTHC, k_BTHC, v_BTHW, visibility, self.execution, self._softmax)
            return linear(self, "output", mixed)
        allowed = visibility.with_cache(positions_BT, past["keys"].shape[2])
        if up.delta is None:
            mixed = self._absorbed(inputs, dequantised(up.value, x_BTD.dtype), past, allowed)
        else:  # an adapter may change the matrix differently in each row of the batch
            mixed = self._adapted(inputs, past, allowed)
        return linear(self, "output", mixed)

    @property
    def _widths(self) -> Widths:
        assert self.config.latent is not None
        return self.config.latent

    @property
    def _softmax(self) -> Softmax:
        scaling = self.config.rotary_scaling
        scale = self.config.head_width**-0.5 * (1.0 if scaling is None else scaling.latent_scale)
        return Softmax(scale, layout=self.execution.products)

    def _inputs(self, x_BTD: jax.Array, positions_BT: jax.Array) -> Inputs:
        config, widths = self.config, self._widths
        by = angles_of(config, positions_BT, self.execution.attention == "blocks")
        queries = jnp.split(self._queries(x_BTD), [config.head_width - widths.rotary_width], axis=-1)
        latent_BTL, key_BTC = jnp.split(linear(self, "latent", x_BTD), [widths.rank], axis=-1)
        latent_BTL = RMSNorm(config, epsilon=EPSILON, name="latent_norm")(latent_BTL)
        turned = (rotate(x, by, config.rotary_interleaved) for x in (queries[1], key_BTC[:, :, None]))
        turned_BTHC, key_BT1C = turned
        return Inputs(queries[0], turned_BTHC, latent_BTL, key_BT1C)

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        if self._widths.query_rank is None:
            return linear(self, "query", x_BTD)
        down_BTQ = linear(self, "query_down", x_BTD)
        normed_BTQ = RMSNorm(self.config, epsilon=EPSILON, name="query_down_norm")(down_BTQ)
        return linear(self, "query_up", normed_BTQ)

    def _expanded(self, latent_BTL: jax.Array, key_BT1C: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, T, H, C] and values [B, T, H, W] of every head."""
        unrotated = self.config.head_width - self._widths.rotary_width
        plain_BTHC, v_BTHW = jnp.split(linear(self, "latent_up", latent_BTL), [unrotated], axis=-1)
        shared_BTHC = jnp.broadcast_to(key_BT1C, (*plain_BTHC.shape[:3], key_BT1C.shape[-1]))
        return jnp.concatenate([plain_BTHC, shared_BTHC], axis=-1), v_BTHW

    def _adapted(self, inputs: Inputs, past: cache.Layer, allowed: jax.Array) -> jax.Array:
        """Attention to a cache whose keys and values are formed, [B, T, H, W]."""
        latent_B1PL, key_B1PC = (
            scaled(cache.values(past, name, inputs.latent_BTL.dtype), past, name, axis=3) for name in ("values", "keys")
        )
        k_BPHC, v_BPHW = self._expanded(latent_B1PL[:, 0], key_B1PC.transpose(0, 2, 1, 3))
        formed = {"keys": k_BPHC.transpose(0, 2, 1, 3), "values": v_BPHW.transpose(0, 2, 1, 3)}
        k_BTHC, v_BTHW = self._expanded(inputs.latent_BTL, inputs.key_BT1C)
        return cached_attention(inputs.q_BTHC, k_BTHC, v_BTHW, formed, allowed, self._softmax)

    def _absorbed(self, inputs: Inputs, up_LHX: jax.Array, past: cache.Layer, allowed: jax.Array) -> jax.Array:
        """Attention to latent vectors themselves, of T new tokens and the P entries of a cache, [B, T, H, W]."""
        layout, dtype = self.execution.products, inputs.latent_BTL.dtype
        keys_LHC, values_LHW = jnp.split(up_LHX, [inputs.plain_BTHC.shape[-1]], axis=-1)
        within_BTHL = jnp.einsum("BTHC,LHC->BTHL", inputs.plain_BTHC, keys_LHC)
        batch, time, heads, _ = within_BTHL.shape
        # all heads read the same keys, so that heads and positions are the rows of one product
        within, turned = (
            x.transpose(0, 2, 1, 3).reshape(batch, 1, heads * time, -1) for x in (within_BTHL, inputs.turned_BTHC)
        )

        def products(latents: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            pairs = ((within, latents), (turned, keys))
            of_latents, of_keys = (dot(rows, x.astype(dtype), 1, 1, layout, batch=2) for rows, x in pairs)
            return of_latents, of_keys

        latent_B1TL, key_B1TC = inputs.latent_BTL[:, None], inputs.key_BT1C.transpose(0, 2, 1, 3)
        held_latents, held_keys = (cache.values(past, name, dtype) for name in ("values", "keys"))
        old_latents, old_keys = products(held_latents, held_keys)
        new_latents, new_keys = products(latent_B1TL, key_B1TC)
        old = scaled(old_latents, past, "values") + scaled(old_keys, past, "keys")
        scores = jnp.concatenate([old, new_latents + new_keys], axis=-1) * self._softmax.scale_of(within)
        scores = jnp.where(allowed, scores.reshape(batch, 1, heads, time, -1), jnp.float32(MASKED))
        shares = jax.nn.softmax(scores, axis=-1).reshape(batch, 1, heads * time, -1)
        old_B1QP, new_B1QT = jnp.split(shares, [past["keys"].shape[2]], axis=-1)
        old_B1QP = scaled(old_B1QP, past, "values").astype(dtype)
        mixed = dot(old_B1QP, held_latents, 1, 0, layout, batch=2)
        mixed = mixed + dot(new_B1QT.astype(dtype), latent_B1TL, 1, 0, layout, batch=2)
        mixed_BHTL = mixed.astype(dtype).reshape(batch, heads, time, -1)
        return jnp.einsum("BHTL,LHW->BTHW", mixed_BHTL, values_LHW)
