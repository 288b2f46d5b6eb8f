"""The feed-forward half of a dense block, and the block beside experts that computes every token."""

import flax.linen as nn
import jax

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models.activations import Gated
from moe_reduce.models.weights import linear


class FeedForward(nn.Module):
    """A gated block, down(activation(gate·x, up·x)), or exact GELU, down(gelu(up·x)) (arXiv:1606.08415)."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.feed_forward == "gelu":
            hidden_BTF = jax.nn.gelu(linear(self, "up", x_BTD), approximate=False)
        else:
            hidden_BTF = Gated.of(self.config)(linear(self, "gate", x_BTD), linear(self, "up", x_BTD))
        return linear(self, "down", hidden_BTF)
