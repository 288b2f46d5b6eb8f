"""The parts every decoder shares: norm, rotary positions, attention, dense feed-forward, embeddings."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import cache, deltas, products
from moe_reduce.models.attention import splash

# Of attention in blocks: XLA on CPU runs a batched product on one core, but several that do not wait for one another
# at once, so blocks occupy more cores and leave out most of what the mask would.
BLOCKS, SMALLEST_BLOCK = 4, 64


def normal_init(std: float) -> nn.initializers.Initializer:
    """Gaussian with the given standard deviation."""
    return nn.initializers.normal(std)


def residual_std(config: ModelConfig) -> float:
    """Of matrices that write to the residual stream: 2N writes keep its variance near one (GPT-2)."""
    return config.init_std / (2 * config.layers) ** 0.5


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axes together, in fp32 (arXiv:1910.07467)."""

    epsilon: float
    axes: int = 1  # how many

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-self.axes :])
        x_float = x.astype(jnp.float32)
        axes = tuple(range(-self.axes, 0))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_float), axis=axes, keepdims=True) + self.epsilon)
        scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
        return (x_float * inverse * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation · scale + bias over the last axis, in fp32 (arXiv:1607.06450)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x_float = x.astype(jnp.float32)
        centred = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.broadcast_to(part.astype(jnp.float32), x.shape) for part in (scale, bias))
        return (centred * inverse * scale + bias).astype(x.dtype)


def residual_norm(config: ModelConfig, name: str) -> RMSNorm | LayerNorm:
    """The norm of the residual stream, as a submodule of whoever calls."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.norm_epsilon, name=name)


def turns(positions_BT: jax.Array, width: int, theta: float, stored: bool = False) -> tuple[jax.Array, jax.Array]:
    """(sine, cosine) of the rotary embedding's angles for so many channels, fp32 [B, T, 1, width / 2] each.

    stored: written to memory; XLA on CPU computes them again for each head otherwise (turning 4 x 256 x 12 heads of 64
    took 1.9 ms, and takes 0.3).
    """
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    return (products.pinned(sine), products.pinned(cosine)) if stored else (sine, cosine)


def rotate(x_BTHC: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, halves convention of Hugging Face LLaMA (arXiv:2104.09864), in fp32.

    Channels behind those of `turns` pass as they are (GPT-NeoX, arXiv:2204.06745).
    """
    sine, cosine = turns
    width = 2 * sine.shape[-1]
    if width < x_BTHC.shape[-1]:
        turned = rotate(x_BTHC[..., :width], turns)
        return jnp.concatenate([turned, x_BTHC[..., width:]], axis=-1)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTHC.dtype)


def matmul(x: jax.Array, matrix: jax.Array, execution: ExecutionConfig, inputs: int = 1) -> jax.Array:
    """x [B, T, *in] · matrix [*in, *out] -> [B, T, *out]; `inputs` axes are contracted.

    As one two-dimensional product: with batch and time apart, XLA on CPU ran the gradient at a third of the speed.
    """
    rows, size = x.shape[0] * x.shape[1], math.prod(matrix.shape[:inputs])
    y: Any = products.product(x.reshape(rows, size), matrix.reshape(size, -1), execution.products)
    return checkpoint_name(y, products.KEPT).reshape(*x.shape[:2], *matrix.shape[inputs:])


def linear(
    module: nn.Module,
    name: str,
    x: jax.Array,
    shape: tuple[int | None, ...],
    init: nn.initializers.Initializer,
    execution: ExecutionConfig,
    inputs: int = 1,
    bias: bool = False,
) -> jax.Array:
    """x [B, T, *in] · the module's parameter of this name [*in, *out], and what an adapter adds: [B, T, *out].

    bias: the parameter NAME_bias [*out] is added, behind the adapter's change.
    """
    matrix = module.param(name, init, shape)
    y = matmul(x, matrix, execution, inputs)
    delta = deltas.delta_of(module, name)
    if delta is not None:
        rows, size = x.shape[0] * x.shape[1], math.prod(matrix.shape[:inputs])
        flat = (x.reshape(rows, size), y.reshape(rows, -1), matrix.reshape(size, -1))
        y = deltas.adapted(*flat, delta, execution.products).reshape(y.shape)
    if not bias:
        return y
    added = module.param(f"{name}_bias", nn.initializers.zeros, matrix.shape[inputs:])
    # in fp32, so that its gradient, a sum over all tokens, is one too
    return (y.astype(jnp.float32) + jnp.broadcast_to(added.astype(jnp.float32), y.shape)).astype(y.dtype)


def causal_attention(
    q_BTHC, k_BTGC, v_BTGC, mask_B1TT: jax.Array | None, form: str = "plain", blocks: int = 1
) -> jax.Array:
    """Softmax attention over the past, [B, T, H, C]; query head h reads key/value head h·G/H.

    blocks: of queries, at most, each computed over the keys up to its end: five eighths of the products with four.
    """
    batch, time, heads, width = q_BTHC.shape
    groups = k_BTGC.shape[2]
    q_BGRTC = q_BTHC.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k_BGSC, v_BGSC = k_BTGC.transpose(0, 2, 1, 3), v_BTGC.transpose(0, 2, 1, 3)
    steps_T = jnp.arange(time, dtype=jnp.int32)
    past_B1TT = (steps_T[:, None] >= steps_T[None, :])[None, None]
    allowed_B1TT = past_B1TT if mask_B1TT is None else past_B1TT & mask_B1TT
    mixed = []
    for start, end in _blocks(time, blocks):
        # the R query heads of a group and their positions are rows of one product, so no key or value is repeated
        q_BGQC = q_BGRTC[:, :, :, start:end].reshape(batch, groups, -1, width)
        read = (k_BGSC[:, :, :end], v_BGSC[:, :, :end], allowed_B1TT[:, :, start:end, :end])
        part: Any = products.attention(q_BGQC, *read, form)
        mixed.append(part.reshape(batch, heads, end - start, width))
    return jnp.concatenate(mixed, axis=2).transpose(0, 2, 1, 3)


def _blocks(time: int, blocks: int) -> list[tuple[int, int]]:
    """The first position of each block, and that behind its last. A time that is no number yet is one block."""
    if blocks == 1:
        return [(0, time)]
    rows = max(SMALLEST_BLOCK, -(-time // blocks))
    return [(start, min(start + rows, time)) for start in range(0, time, rows)]


def attention(q_BTHC, k_BTGC, v_BTGC, segments_BT: jax.Array | None, execution: ExecutionConfig) -> jax.Array:
    """Over the past of the same segment, in the way that `execution.attention` names: [B, T, H, C]."""
    way = execution.attention
    if way == "splash":
        return splash.causal_attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, execution.platform != "tpu")
    mask_B1TT = None if segments_BT is None else segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    if way == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHC, k_BTGC, v_BTGC, mask=mask_B1TT, is_causal=True, implementation="cudnn"
        )
    return causal_attention(q_BTHC, k_BTGC, v_BTGC, mask_B1TT, execution.products, BLOCKS if way == "blocks" else 1)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245).

    Over the tokens of the call, within their segments; where it is given a cache, over what that holds as well,
    without segments (see models/cache.py).
    """

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        config = self.config
        q_BTHC = self._project("query", x_BTD, config.query_heads)
        k_BTGC = self._project("key", x_BTD, config.key_value_heads)
        v_BTGC = self._project("value", x_BTD, config.key_value_heads)
        if config.qk_norm:
            axes = 2 if config.qk_norm_scope == "projection" else 1
            q_BTHC = RMSNorm(config.norm_epsilon, axes, name="query_norm")(q_BTHC)
            k_BTGC = RMSNorm(config.norm_epsilon, axes, name="key_norm")(k_BTGC)
        if config.clip_qkv is not None:
            largest = config.clip_qkv
            q_BTHC, k_BTGC, v_BTGC = (jnp.clip(x, -largest, largest) for x in (q_BTHC, k_BTGC, v_BTGC))
        width, stored = int(config.rotary_share * config.head_width), self.execution.attention == "blocks"
        turned = turns(positions_BT, width, config.rope_theta, stored)
        q_BTHC, k_BTGC = rotate(q_BTHC, turned), rotate(k_BTGC, turned)
        cache.hand_out(self, k_BTGC, v_BTGC)
        past = cache.layer_of(self)
        if past is not None:
            mixed_BTHC = cache.attention(q_BTHC, k_BTGC, v_BTGC, past, positions_BT, self.execution.products)
        else:
            mixed_BTHC = attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, self.execution)
        shape = (config.query_heads, config.head_width, config.width)
        init = normal_init(residual_std(config))
        return linear(self, "output", mixed_BTHC, shape, init, self.execution, inputs=2, bias=config.biases)

    def _project(self, name: str, x_BTD: jax.Array, heads: int) -> jax.Array:
        shape = (self.config.width, heads, self.config.head_width)
        init = normal_init(self.config.init_std)
        return linear(self, name, x_BTD, shape, init, self.execution, bias=self.config.biases)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate·x) · up·x) (arXiv:2002.05202); or down(gelu(up·x)), exact (arXiv:1606.08415)."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        if config.feed_forward == "swiglu":
            hidden_BTF = jax.nn.silu(self._inward("gate", x_BTD)) * self._inward("up", x_BTD)
        else:
            hidden_BTF = jax.nn.gelu(self._inward("up", x_BTD), approximate=False)
        shape, init = (config.feed_forward_width, config.width), normal_init(residual_std(config))
        return linear(self, "down", hidden_BTF, shape, init, self.execution, bias=config.biases)

    def _inward(self, name: str, x_BTD: jax.Array) -> jax.Array:
        shape, init = (self.config.width, self.config.feed_forward_width), normal_init(self.config.init_std)
        return linear(self, name, x_BTD, shape, init, self.execution, bias=self.config.biases)


class Embedding(nn.Module):
    """Token table, whole [V, D] or factorised U [V, K] · W [K, D] (ALBERT, arXiv:1909.11942)."""

    config: ModelConfig
    execution: ExecutionConfig

    def setup(self):
        config = self.config
        if config.embedding_factor is None:
            self.table = self.param("table", normal_init(config.init_std), (config.vocab_size, config.width))
            return
        # E = U·W has entries of standard deviation init_std, and W keeps the length of what passes through it.
        inner = config.embedding_factor
        self.factor = self.param("factor", normal_init(config.init_std), (config.vocab_size, inner))
        self.projection = self.param("projection", normal_init(inner**-0.5), (inner, config.width))

    def encode(self, tokens_BT: jax.Array) -> jax.Array:
        """Ids [B, T] -> x [B, T, D]. Cast behind the gather, so that gradients of frequent tokens add up in fp32."""
        dtype = jnp.dtype(self.execution.compute_dtype)
        if self.config.embedding_factor is None:
            return self.table[tokens_BT].astype(dtype)
        return matmul(self.factor[tokens_BT].astype(dtype), self.projection, self.execution)

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """x [B, T, D] -> logits [B, T, V] with the tied table, accumulated in fp32."""
        if self.config.embedding_factor is None:
            return output_logits(x_BTD, self.table, self.execution)
        inner_BTK = matmul(x_BTD, self.projection.T, self.execution)
        return output_logits(inner_BTK, self.factor, self.execution)


def output_logits(x_BTD: jax.Array, table_VD: jax.Array, execution: ExecutionConfig) -> jax.Array:
    """fp32 logits [B, T, V] of inputs in the compute dtype."""
    batch, time, width = x_BTD.shape
    logits_SV: Any = products.logits(x_BTD.reshape(batch * time, width), table_VD, execution.products)
    return logits_SV.reshape(batch, time, -1)


class Unembedding(nn.Module):
    """An output table of its own, for models that do not tie it to the input."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shape = (self.config.vocab_size, self.config.width)
        table_VD = self.param("table", normal_init(self.config.init_std), shape)
        return output_logits(x_BTD, table_VD, self.execution)
