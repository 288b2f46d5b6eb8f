"""Self-attention with grouped key/value heads."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import cache
from moe_reduce.models.attention.rotary import angles_of, rotate
from moe_reduce.models.attention.softmax import PLAIN, TILES, Softmax, attention, cached_attention
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.collect import sow
from moe_reduce.models.norms import RMSNorm
from moe_reduce.models.weights import linear, read

# True where a layer has a sliding window, traced in a scan over layers; None if all layers are alike.
Windowed = bool | jax.Array | None


class Attention(nn.Module):
    """Self-attention with grouped key/value heads (GQA, arXiv:2305.13245); visibility.py says which keys a query sees.

    With a cache, a token attends to the cache's entries too, whatever its segment.
    """

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None, windowed: Windowed = None
    ) -> jax.Array:
        config = self.config
        q_BTHC, k_BTGC, v_BTGC = (linear(self, name, x_BTD) for name in ("query", "key", "value"))
        gate_BTHC = None
        if config.output_gate:
            q_BTHC, gate_BTHC = jnp.split(q_BTHC, 2, axis=-1)
        if config.qk_norm:
            axes = 2 if config.qk_norm_scope == "projection" else 1
            q_BTHC = RMSNorm(config, axes, name="query_norm")(q_BTHC)
            k_BTGC = RMSNorm(config, axes, name="key_norm")(k_BTGC)
        if config.clip_qkv is not None:
            limit = config.clip_qkv
            q_BTHC, k_BTGC, v_BTGC = (jnp.clip(x, -limit, limit) for x in (q_BTHC, k_BTGC, v_BTGC))
        by = angles_of(config, positions_BT, self.execution.attention == "blocks")
        q_BTHC, k_BTGC = (rotate(x, by, config.rotary_interleaved) for x in (q_BTHC, k_BTGC))
        sow(self, cache.KEYS_VALUES, {"keys": k_BTGC, "values": v_BTGC})
        past = cache.layer_of(self)
        sinks_H = read(self, "sinks") if config.sinks else None
        softmax = Softmax(sinks_H=sinks_H, layout=self.execution.products)

        def mixed(window: int | None) -> jax.Array:
            visibility = Visibility(config, segments_BT, window)
            if past is None:
                return self_attention(q_BTHC, k_BTGC, v_BTGC, visibility, self.execution, softmax)
            allowed = visibility.with_cache(positions_BT, past["keys"].shape[2])
            return cached_attention(q_BTHC, k_BTGC, v_BTGC, past, allowed, softmax)

        mixed_BTHC = by_window(config, windowed, mixed)
        return linear(self, "output", mixed_BTHC if gate_BTHC is None else mixed_BTHC * jax.nn.sigmoid(gate_BTHC))


def by_window(config: ModelConfig, windowed: Windowed, run: Callable[[int | None], jax.Array]) -> Any:
    """run(window of the layer): kernels take static windows, so that a traced choice is one between two kernels."""
    window = config.sliding_window
    if windowed is None or isinstance(windowed, bool):
        return run(None if windowed is False else window)
    return jax.lax.cond(windowed, lambda: run(window), lambda: run(None))


def self_attention(
    q_BTHC, k_BTGC, v_BTGC, visibility: Visibility, execution: ExecutionConfig, softmax: Softmax = PLAIN
) -> jax.Array:
    """Attention of a row's tokens to one another, [B, T, H, C], by the kernel that `execution.attention` names.

    Sinks are computed by the plain kernel alone.
    """
    kernel, scale = execution.attention, softmax.scale_of(q_BTHC)
    if kernel in ("splash", "cudnn") and softmax.sinks_H is None:
        return _fused(q_BTHC, k_BTGC, v_BTGC, visibility, scale, execution)
    tiles = TILES if kernel == "blocks" else 1
    return attention(q_BTHC, k_BTGC, v_BTGC, visibility, softmax._replace(layout=execution.products), tiles)


def _fused(q_BTHC, k_BTGC, v_BTGW, visibility: Visibility, scale: float, execution: ExecutionConfig) -> jax.Array:
    """Attention by a kernel that takes keys and values of one width."""
    width = v_BTGW.shape[-1]
    if width != k_BTGC.shape[-1]:
        v_BTGW = jnp.pad(v_BTGW, ((0, 0), (0, 0), (0, 0), (0, k_BTGC.shape[-1] - width)))
    if execution.attention == "splash":
        from moe_reduce.models.attention import splash  # importing Pallas takes a while, and only TPUs need it

        mixed = splash.attention(q_BTHC, k_BTGC, v_BTGW, visibility, scale, execution.platform != "tpu")
    else:
        given = visibility.arguments()
        mixed = jax.nn.dot_product_attention(q_BTHC, k_BTGC, v_BTGW, scale=scale, **given, implementation="cudnn")
    return mixed[..., :width]
