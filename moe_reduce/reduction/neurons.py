"""Narrower feed-forward blocks and experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, bias_of, parameters
from moe_reduce.reduction.transform import Leaves, transform


def prune_neurons(model: Model, keep: int) -> Model:
    """Keep the `keep` neurons of largest ‖gate_f‖·‖up_f‖·‖down_f‖ in each layer, or in each expert.

    In SwiGLU, that product times ‖x‖² bounds what neuron f can add, since |silu(z)| <= |z|. A GELU block has no gate:
    there the product lacks ‖gate_f‖, and the bound is the product times ‖x‖. A bias counts as the weight of an input
    that is always 1. Norms are in fp32. The kept neurons stay in their order, so that keeping all is the identity.
    Raises UserError when `keep` is not in 1..F.
    """
    width = _width(model.config)
    if not 1 <= keep <= width:
        raise UserError(f"keep={keep} is not in 1..{width}, the neurons of a feed-forward block: choose one of these")
    per_neuron = [record for record in parameters(model.config) if "F" in record.axes]

    def prune(leaves: Leaves) -> Leaves:
        size = _sizes(model.config, per_neuron, leaves)
        kept = jnp.sort(jax.lax.top_k(size, keep)[1], axis=-1)
        return {record.path: _take(leaves[record.path], kept, record.axes.index("F")) for record in per_neuron}

    return transform(model, _with_width(model.config, keep), per_neuron, prune)


def _width(config: ModelConfig) -> int:
    if config.moe is not None:
        return config.moe.width
    assert config.feed_forward_width is not None, "a dense model has a feed_forward_width"
    return config.feed_forward_width


def _with_width(config: ModelConfig, width: int) -> ModelConfig:
    if config.moe is None:
        return dataclasses.replace(config, feed_forward_width=width)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, width=width))


def _sizes(config: ModelConfig, records: list[Parameter], leaves: Leaves) -> jax.Array:
    """Product of the norms of each neuron's weights, fp32 […, F]."""
    norms = []
    for record in (record for record in records if record.is_matrix):
        weights, bias = leaves[record.path], bias_of(config, record)
        if bias is not None and bias.path in leaves:
            weights = jnp.concatenate([weights, leaves[bias.path][..., None, :]], axis=-2)
        norms.append(jnp.linalg.norm(weights.astype(jnp.float32), axis=-1 if record.inputs == "F" else -2))
    return functools.reduce(jnp.multiply, norms)


def _take(leaf: jax.Array, kept: jax.Array, axis: int) -> jax.Array:
    """Take the kept indices […, K] along an axis of a matrix, or along the last axis of a bias."""
    if leaf.ndim > kept.ndim:
        kept = jnp.expand_dims(kept, leaf.ndim - 1 if axis == leaf.ndim - 2 else leaf.ndim - 2)
    return jnp.take_along_axis(leaf, kept, axis=axis)
