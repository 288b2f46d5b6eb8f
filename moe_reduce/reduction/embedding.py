"""The token embedding as a product of two thin factors."""

import dataclasses

import jax.numpy as jnp

from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import only_record, select
from moe_reduce.reduction.transform import Leaves, transform


def factorise_embedding(model: Model, inner: int) -> Model:
    """Factorise the tied table [V, D] into factor [V, K] · projection [K, D], K = `inner`, by truncated SVD.

    The product is the best approximation of rank K, and equals the table if K reaches its rank. Factors are scaled so
    that the projection preserves lengths on average, as at initialisation (ALBERT, arXiv:1909.11942). The SVD runs in
    fp32; both factors get the dtype of the table. Raises UserError for an untied or factorised model, or a K out of
    range.
    """
    config = model.config
    if not config.tied_embeddings:
        raise UserError(
            "tied_embeddings is False, but the factors replace one table for input and output: give a model with tied "
            "embeddings"
        )
    if config.embedding_factor is not None:
        raise UserError(
            f"the embedding is factorised already (embedding_factor={config.embedding_factor}): factorise only once"
        )
    largest = min(config.vocab_size, config.width)
    if not 1 <= inner <= largest:
        raise UserError(f"inner={inner} is not in 1..{largest}, the ranks of the embedding: choose one of these")
    table = only_record(config, "embedding")
    factorised = dataclasses.replace(config, embedding_factor=inner)

    def factorise(leaves: Leaves) -> Leaves:
        table_VD = leaves[table.path]
        left, singular, right = jnp.linalg.svd(table_VD.astype(jnp.float32), full_matrices=False)
        gain = (config.width / inner) ** 0.5  # scale of the projection relative to orthonormal rows
        factors = {"VK": left[:, :inner] * (singular[None, :inner] / gain), "KD": right[:inner] * gain}
        records = select(factorised, component="embedding")
        return {record.path: factors[record.axes].astype(table_VD.dtype) for record in records}

    return transform(model, factorised, [table], factorise)
