"""Token ids -> vectors, and vectors -> logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models.weights import logits, lookup, matmul, weight


class Embedding(nn.Module):
    """Token table, whole [V, D] or factorised U [V, K] · W [K, D] (ALBERT, arXiv:1909.11942)."""

    config: ModelConfig
    execution: ExecutionConfig

    def setup(self):
        if self.config.embedding_factor is None:
            self.table = weight(self, "table")
        else:
            self.factor, self.projection = weight(self, "factor"), weight(self, "projection")

    def encode(self, tokens_BT: jax.Array) -> jax.Array:
        """Ids [B, T] -> x [B, T, D] in the compute dtype."""
        dtype = jnp.dtype(self.execution.compute_dtype)
        if self.config.embedding_factor is None:
            return lookup(tokens_BT, self.table, dtype)
        return matmul(lookup(tokens_BT, self.factor, dtype), self.projection)

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """x [B, T, D] -> fp32 logits [B, T, V] with the tied table."""
        if self.config.embedding_factor is None:
            return logits(x_BTD, self.table)
        return logits(matmul(x_BTD, self.projection, transposed=True), self.factor)


class Unembedding(nn.Module):
    """The output table of models that do not tie it to the input table."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return logits(x_BTD, weight(self, "table"))
