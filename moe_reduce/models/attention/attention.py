"""Causal self-attention with grouped key/value heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import cache
from moe_reduce.models.attention import splash
from moe_reduce.models.attention.rotary import angles, rotate
from moe_reduce.models.attention.softmax import TILES, cached_attention, causal_attention
from moe_reduce.models.collect import sow
from moe_reduce.models.norms import RMSNorm
from moe_reduce.models.weights import linear


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245).

    A token attends to this call's tokens of its segment; with a cache, also to its entries, and segments are ignored.
    """

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        config = self.config
        q_BTHC, k_BTGC, v_BTGC = (linear(self, name, x_BTD) for name in ("query", "key", "value"))
        if config.qk_norm:
            axes = 2 if config.qk_norm_scope == "projection" else 1
            q_BTHC = RMSNorm(config, axes, name="query_norm")(q_BTHC)
            k_BTGC = RMSNorm(config, axes, name="key_norm")(k_BTGC)
        if config.clip_qkv is not None:
            limit = config.clip_qkv
            q_BTHC, k_BTGC, v_BTGC = (jnp.clip(x, -limit, limit) for x in (q_BTHC, k_BTGC, v_BTGC))
        width, stored = int(config.rotary_share * config.head_width), self.execution.attention == "blocks"
        by = angles(positions_BT, width, config.rope_theta, stored)
        q_BTHC, k_BTGC = rotate(q_BTHC, by), rotate(k_BTGC, by)
        sow(self, cache.KEYS_VALUES, {"keys": k_BTGC, "values": v_BTGC})
        past = cache.layer_of(self)
        if past is not None:
            mixed_BTHC = cached_attention(q_BTHC, k_BTGC, v_BTGC, past, positions_BT, self.execution.products)
        else:
            mixed_BTHC = self_attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, self.execution)
        return linear(self, "output", mixed_BTHC)


def self_attention(q_BTHC, k_BTGC, v_BTGC, segments_BT: jax.Array | None, execution: ExecutionConfig) -> jax.Array:
    """Causal attention within segments, [B, T, H, C], by the kernel that `execution.attention` names."""
    kernel = execution.attention
    if kernel == "splash":
        return splash.causal_attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, execution.platform != "tpu")
    mask_B1TT = None if segments_BT is None else segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHC, k_BTGC, v_BTGC, mask=mask_B1TT, is_causal=True, implementation="cudnn"
        )
    tiles = TILES if kernel == "blocks" else 1
    return causal_attention(q_BTHC, k_BTGC, v_BTGC, mask_B1TT, execution.products, tiles)
