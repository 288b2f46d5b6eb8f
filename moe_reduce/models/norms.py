"""RMSNorm and LayerNorm, computed in fp32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.weights import read


class RMSNorm(nn.Module):
    """x / rms(x) · factor over the last `axes` axes, in fp32 (arXiv:1910.07467).

    epsilon: added to the mean square; None: the model's norm_epsilon.
    """

    config: ModelConfig
    axes: int = 1
    epsilon: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        over = tuple(range(-self.axes, 0))
        x_float = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x_float), axis=over, keepdims=True)
        inverse = jax.lax.rsqrt(mean + (self.config.norm_epsilon if self.epsilon is None else self.epsilon))
        scale = jnp.broadcast_to(factor(self.config, read(self, "scale").astype(jnp.float32)), x.shape)
        return (x_float * inverse * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation · scale + bias over the last axis, in fp32 (arXiv:1607.06450)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x_float = x.astype(jnp.float32)
        centred = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(variance + self.config.norm_epsilon)
        scale, bias = (jnp.broadcast_to(read(self, name).astype(jnp.float32), x.shape) for name in ("scale", "bias"))
        return (centred * inverse * scale + bias).astype(x.dtype)


def residual_norm(config: ModelConfig, name: str) -> RMSNorm | LayerNorm:
    """A norm of the residual stream, as a submodule called `name` of the calling module."""
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config, name=name)


def factor(config: ModelConfig, scale: Any) -> Any:
    """Multiplier of a norm, from its stored scale."""
    return scale + 1 if config.norm == "centred_rms" else scale


def stored_scale(config: ModelConfig, factor: Any) -> Any:
    """Inverse of `factor`."""
    return factor - 1 if config.norm == "centred_rms" else factor
