"""The feed-forward half of a dense block."""

import flax.linen as nn
import jax

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models.weights import linear


class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate·x) · up·x) (arXiv:2002.05202), or exact GELU, down(gelu(up·x)) (arXiv:1606.08415)."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.feed_forward == "swiglu":
            hidden_BTF = jax.nn.silu(linear(self, "gate", x_BTD)) * linear(self, "up", x_BTD)
        else:
            hidden_BTF = jax.nn.gelu(linear(self, "up", x_BTD), approximate=False)
        return linear(self, "down", hidden_BTF)
