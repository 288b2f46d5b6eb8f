"""Self-attention with grouped key/value heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import cache
from moe_reduce.models.attention.rotary import angles, rotate
from moe_reduce.models.attention.softmax import TILES, attention, cached_attention
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.collect import sow
from moe_reduce.models.norms import RMSNorm
from moe_reduce.models.weights import linear


class Attention(nn.Module):
    """Self-attention with grouped key/value heads (GQA, arXiv:2305.13245); visibility.py says which keys a query sees.

    With a cache, a token attends to the cache's entries too, whatever its segment.
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
        past, visibility = cache.layer_of(self), Visibility(config, segments_BT)
        if past is not None:
            allowed = visibility.with_cache(positions_BT, past["keys"].shape[2])
            mixed_BTHC = cached_attention(q_BTHC, k_BTGC, v_BTGC, past, allowed, self.execution.products)
        else:
            mixed_BTHC = self_attention(q_BTHC, k_BTGC, v_BTGC, visibility, self.execution)
        return linear(self, "output", mixed_BTHC)


def self_attention(q_BTHC, k_BTGC, v_BTGC, visibility: Visibility, execution: ExecutionConfig) -> jax.Array:
    """Attention of a row's tokens to one another, [B, T, H, C], by the kernel that `execution.attention` names."""
    kernel = execution.attention
    if kernel == "splash":
        from moe_reduce.models.attention import splash  # importing Pallas takes a while, and only TPUs need it

        return splash.attention(q_BTHC, k_BTGC, v_BTGC, visibility, execution.platform != "tpu")
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q_BTHC, k_BTGC, v_BTGC, **visibility.arguments(), implementation="cudnn")
    tiles = TILES if kernel == "blocks" else 1
    return attention(q_BTHC, k_BTGC, v_BTGC, visibility, execution.products, tiles)
