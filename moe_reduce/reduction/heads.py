"""Fewer key/value heads."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameters
from moe_reduce.reduction.transform import Leaves, transform


def group_heads(model: Model, key_value_heads: int) -> Model:
    """Replace each group of neighbouring key/value heads by its mean (GQA, arXiv:2305.13245).

    Logits do not change if the heads of each group are equal. Means are taken in fp32 and have the dtype of the
    parameter. Raises UserError unless `key_value_heads` divides the present number.
    """
    present = model.config.key_value_heads
    if key_value_heads < 1 or present % key_value_heads:
        fitting = ", ".join(str(number) for number in range(1, present + 1) if present % number == 0)
        raise UserError(f"key_value_heads={key_value_heads} does not divide the model's {present}: give {fitting}")
    per_head = [record for record in parameters(model.config) if "G" in record.axes]

    def group(leaves: Leaves) -> Leaves:
        return {record.path: _group_means(leaves[record.path], key_value_heads) for record in per_head}

    return transform(model, dataclasses.replace(model.config, key_value_heads=key_value_heads), per_head, group)


def _group_means(heads: jax.Array, count: int) -> jax.Array:
    """[…, G, C] -> […, count, C]."""
    groups = heads.astype(jnp.float32).reshape(*heads.shape[:-2], count, -1, heads.shape[-1])
    first = groups[..., :1, :]
    # first head plus the mean difference from it, so that any number of equal heads gives exactly that head
    return (first + jnp.mean(groups - first, axis=-2, keepdims=True))[..., 0, :].astype(heads.dtype)
