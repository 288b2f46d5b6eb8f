"""Sparse weights: set the smallest weights of each matrix to zero, or two of each four consecutive inputs (2:4).

Both treat each attention, feed-forward and expert matrix separately and leave embeddings, norms, routers and biases
as they are. I and O are the inputs and outputs of a matrix.
"""

from collections.abc import Callable
from decimal import Decimal

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, parameters
from moe_reduce.reduction.transform import Leaves, transform

PRUNED = ("attention", "feed_forward", "experts")  # components whose matrices are pruned


def prune_magnitude(model: Model, share: float) -> Model:
    """Set the ⌊share · n⌋ smallest |w| of each matrix of n weights to zero; among equals, the first.

    Weights that are zero already count towards the share. Raises UserError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise UserError(f"share={share} must be at least 0 and below 1: it is the share of the weights set to zero")

    def prune(w_IO: jax.Array) -> jax.Array:
        count = int(Decimal(str(share)) * w_IO.size)  # exact for the share as it is written: 0.29 · 100 is 29
        smallest = jnp.argsort(jnp.abs(w_IO).reshape(-1), stable=True)[:count]
        return w_IO.reshape(-1).at[smallest].set(0, unique_indices=True).reshape(w_IO.shape)

    return _prune_matrices(model, pruned_matrices(model.config), prune)


def prune_two_four(model: Model) -> Model:
    """Keep the 2 largest |w| of each 4 consecutive inputs of each output; ties keep the last.

    Sparse tensor cores read this 2:4 pattern (arXiv:2104.08378). Raises UserError when 4 does not divide the inputs of
    a matrix.
    """
    matrices = pruned_matrices(model.config)
    for record in matrices:
        inputs, _ = record.matrix_shape
        if inputs % 4:
            raise UserError(f"{record.path} has {inputs} inputs, which 4 does not divide: prune by share instead")

    def prune(w_IO: jax.Array) -> jax.Array:
        quads = w_IO.reshape(-1, 4, w_IO.shape[1])
        rank = jnp.argsort(jnp.argsort(jnp.abs(quads), axis=1, stable=True), axis=1)
        return jnp.where(rank >= 2, quads, 0).reshape(w_IO.shape)

    return _prune_matrices(model, matrices, prune)


def pruned_matrices(config: ModelConfig) -> list[Parameter]:
    """Records of the parameters that sparsification changes."""
    return [record for record in parameters(config) if record.is_matrix and record.component in PRUNED]


def _prune_matrices(model: Model, matrices: list[Parameter], prune: Callable[[jax.Array], jax.Array]) -> Model:
    """Apply prune(w_IO) -> w_IO to every matrix, one at a time, because sorting needs extra memory."""

    def prune_all(leaves: Leaves) -> Leaves:
        pruned = {}
        for record in matrices:
            leaf = leaves[record.path]
            pruned[record.path] = jax.lax.map(prune, leaf.reshape(-1, *record.matrix_shape)).reshape(leaf.shape)
        return pruned

    return transform(model, model.config, matrices, prune_all)
