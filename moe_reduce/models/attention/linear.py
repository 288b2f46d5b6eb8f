"""Gated DeltaNet (arXiv:2412.06464): linear attention, whose cache is a state of fixed size.

The cache of a layer holds, instead of keys and values,

    state    [B, R, C, W] fp32, what the delta rule has made of all earlier tokens (attention/delta_rule.py)
    history  [B, P - 1, U], the last inputs of the convolution
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.attention_config import LinearAttention as Sizes
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import cache
from moe_reduce.models.attention.delta_rule import Steps, delta_rule
from moe_reduce.models.collect import sow
from moe_reduce.models.weights import linear, read

EPSILON = 1e-6  # added to the squared length of a query or key


class Inputs(NamedTuple):
    """Channels of the convolution [B, T, U], gates of the outputs [B, T, R, W], and inputs of the rates β
    and of the decays [B, T, R].
    """

    channels_BTU: jax.Array
    gate_BTRW: jax.Array
    beta_BTR: jax.Array
    decay_BTR: jax.Array


class LinearAttention(nn.Module):
    """Linear attention of a row's tokens to one another and, with a cache, to all tokens before them.

    With a cache, each segment of new tokens continues the cached document.
    """

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None = None, real_BT: jax.Array | None = None
    ) -> jax.Array:
        """real_BT: False for padding behind a row's end, which changes no state."""
        sizes, (batch, time, _) = self._sizes, x_BTD.shape
        inputs, past = self._inputs(x_BTD), cache.state_of(self)
        if past is None:
            state_BRCW = jnp.zeros((batch, sizes.value_heads, sizes.key_width, sizes.value_width), jnp.float32)
            history_BPU = jnp.zeros((batch, sizes.taps - 1, sizes.channels), x_BTD.dtype)
        else:
            state_BRCW, history_BPU = past[cache.STATE], past[cache.HISTORY].astype(x_BTD.dtype)
        starts_BT = None if segments_BT is None else _starts(segments_BT)
        mixed_BTU = self._convolved(inputs.channels_BTU, history_BPU, starts_BT)
        out_BTRW, state_BRCW = delta_rule(self._steps(mixed_BTU, inputs, real_BT), state_BRCW, starts_BT)
        history_BPU = _newest(jnp.concatenate([history_BPU, inputs.channels_BTU], axis=1), time, real_BT)
        sow(self, cache.KEYS_VALUES, {cache.STATE: state_BRCW, cache.HISTORY: history_BPU})
        normed_BTRW = GatedNorm(self.config, name="norm")(out_BTRW, inputs.gate_BTRW)
        return linear(self, "output", normed_BTRW.reshape(batch, time, -1))

    @property
    def _sizes(self) -> Sizes:
        assert self.config.linear is not None
        return self.config.linear

    def _inputs(self, x_BTD: jax.Array) -> Inputs:
        sizes = self._sizes
        values = (*x_BTD.shape[:2], sizes.value_heads, sizes.value_width)
        if not sizes.joined:
            channels, gate, beta, decay = (linear(self, name, x_BTD) for name in ("inputs", "gate", "beta", "decay"))
            return Inputs(channels, gate.reshape(values), beta, decay)
        heads = (*x_BTD.shape[:2], sizes.key_heads)
        group, key = sizes.group * sizes.value_width, sizes.key_width
        parts = jnp.split(linear(self, "inputs", x_BTD).reshape(*heads, -1), [key, 2 * key, 2 * key + group], axis=-1)
        rates = jnp.split(linear(self, "rates", x_BTD).reshape(*heads, -1), 2, axis=-1)
        *channels, gate, beta, decay = (part.reshape(*x_BTD.shape[:2], -1) for part in (*parts, *rates))
        return Inputs(jnp.concatenate(channels, axis=-1), gate.reshape(values), beta, decay)

    def _convolved(self, x_BTU: jax.Array, history_BPU: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
        """SiLU of a causal convolution of each channel, with the history before each document."""
        weight_UP = read(self, "convolution").astype(jnp.float32)
        taps, time = weight_UP.shape[1], x_BTU.shape[1]
        whole_BTU = jnp.concatenate([history_BPU, x_BTU], axis=1).astype(jnp.float32)
        total_BTU = jnp.zeros(x_BTU.shape, jnp.float32)
        age_BT = None if starts_BT is None else _age(starts_BT)
        for back in range(taps):  # tokens that this input lies back
            first = taps - 1 - back
            input_BTU = whole_BTU[:, first : first + time]
            if age_BT is not None and back:
                place_BT = jnp.clip(taps - 1 + age_BT - back, 0, taps - 2)
                older_BTU = jnp.take_along_axis(history_BPU, place_BT[:, :, None], axis=1).astype(jnp.float32)
                input_BTU = jnp.where((age_BT >= back)[:, :, None], input_BTU, older_BTU)
            total_BTU = total_BTU + input_BTU * weight_UP[None, None, :, taps - 1 - back]
        return jax.nn.silu(total_BTU).astype(x_BTU.dtype)

    def _steps(self, mixed_BTU: jax.Array, inputs: Inputs, real_BT: jax.Array | None) -> Steps:
        sizes, (batch, time, _) = self._sizes, mixed_BTU.shape
        q, k, v = jnp.split(mixed_BTU.astype(jnp.float32), [sizes.keys, 2 * sizes.keys], axis=-1)

        def heads(x_BTU: jax.Array) -> jax.Array:
            """Vectors of unit length for each value head."""
            x_BTHC = x_BTU.reshape(batch, time, sizes.key_heads, sizes.key_width)
            length = jax.lax.rsqrt(jnp.sum(jnp.square(x_BTHC), axis=-1, keepdims=True) + EPSILON)
            return jnp.repeat(x_BTHC * length, sizes.group, axis=2)

        beta_BTR = jax.nn.sigmoid(inputs.beta_BTR.astype(jnp.float32))
        speed_R, offset_R = (read(self, name).astype(jnp.float32)[None, None] for name in ("log_decay", "decay_offset"))
        decay_BTR = -jnp.exp(speed_R) * jax.nn.softplus(inputs.decay_BTR.astype(jnp.float32) + offset_R)
        if real_BT is not None:
            beta_BTR, decay_BTR = (jnp.where(real_BT[:, :, None], x, 0) for x in (beta_BTR, decay_BTR))
        v_BTRW = v.reshape(batch, time, sizes.value_heads, sizes.value_width)
        return Steps(heads(q) * sizes.key_width**-0.5, heads(k), v_BTRW, beta_BTR, decay_BTR)


class GatedNorm(nn.Module):
    """x / rms(x) · scale · silu(gate) over the last axis, in fp32; the result has the dtype of the gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_epsilon)
        scale = jnp.broadcast_to(read(self, "scale").astype(jnp.float32), x.shape)
        return (x * inverse * scale * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)


def _starts(segments_BT: jax.Array) -> jax.Array:
    """True at the first token of each segment."""
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    first_BT = jnp.arange(segments_BT.shape[1])[None] == 0
    return first_BT | (segments_BT != before_BT)


def _age(starts_BT: jax.Array) -> jax.Array:
    """Number of tokens before each token in its document."""
    places_1T = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)[None]
    return places_1T - jax.lax.cummax(jnp.where(starts_BT, places_1T, 0), axis=1)


def _newest(whole_BTU: jax.Array, time: int, real_BT: jax.Array | None) -> jax.Array:
    """The inputs before the end of each row. whole_BTU: those before the row, then those of its `time` tokens."""
    kept = whole_BTU.shape[1] - time
    if real_BT is None:
        return whole_BTU[:, time:]
    ends_B = jnp.sum(real_BT, axis=1, dtype=jnp.int32)
    return jnp.take_along_axis(whole_BTU, (ends_B[:, None] + jnp.arange(kept)[None])[:, :, None], axis=1)
