"""Activation between the input matrices of a gated block and its output matrix."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig


@jax.tree_util.register_static
@dataclass(frozen=True)
class Gated:
    """SwiGLU, silu(gate)·up (arXiv:2002.05202), or with a limit the clamped one of gpt-oss (arXiv:2508.10925).

    The clamped one is g·σ(alpha·g)·(u + 1) of g = min(gate, limit), and u = up clipped to ±limit.
    """

    limit: float | None = None
    alpha: float = 1.0

    @classmethod
    def of(cls, config: ModelConfig) -> "Gated":
        """The activation of a model's gated blocks."""
        return cls(config.swiglu_limit, config.swiglu_alpha) if config.feed_forward == "clamped_swiglu" else cls()

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """The activation, elementwise."""
        if self.limit is None:
            return jax.nn.silu(gate) * up
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


SWIGLU = Gated()
