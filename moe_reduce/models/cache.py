"""The key/value cache: keys and values of earlier tokens, so that a new token need not recompute them.

A cache is a pytree that enters as the variable collection `CACHE`, under the paths of the attention modules. These
modules read the cache and sow keys and values of new tokens as the collection `KEYS_VALUES`; the caller writes them to
the cache. Entry p of a row holds its token at position p, so positions alone determine the mask
(attention/visibility.py). Each layer has, for P entries (with a leading N if layers are stacked):

    keys, values              [B, G, P, C], in the compute dtype or int8. Heads come before entries, so that products
                              need no transposed copy; G heads, not H (GQA, arXiv:2305.13245)
    key_scales, value_scales  [B, G, P] fp32, for an int8 cache only: the number that an integer 1 stands for
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.models.weights import LARGEST_INT8

CACHE = "cache"
KEYS_VALUES = "keys_values"
SCALES = {"keys": "key_scales", "values": "value_scales"}
Layer = Mapping[str, jax.Array]


def layer_of(module: nn.Module) -> Layer | None:
    """Cache of the layer of an attention module; None if the call has no cache."""
    if not module.has_variable(CACHE, "keys"):
        return None
    names = (*SCALES, *(name for name in SCALES.values() if module.has_variable(CACHE, name)))
    return {name: module.get_variable(CACHE, name) for name in names}


def of_prompts(new: Mapping[str, Any], entries: int, quantised: bool, stacked: bool) -> dict[str, Any]:
    """A cache of `entries` >= T entries that starts with `new`, the keys and values of T tokens."""

    def filled(layer: Layer) -> dict[str, jax.Array]:
        spare = entries - layer["keys"].shape[1]
        return {name: _padded(leaf, spare) for name, leaf in _stored(layer, quantised).items()}

    return _each_layer(jax.vmap(filled) if stacked else filled, new)


def _padded(leaf: jax.Array, spare: int) -> jax.Array:
    """A leaf with `spare` more entries, on the third axis."""
    return jnp.pad(leaf, [(0, spare if axis == 2 else 0) for axis in range(leaf.ndim)])


def written(cache: Mapping[str, Any], new: Mapping[str, Any], positions_B: jax.Array, stacked: bool) -> dict[str, Any]:
    """The cache with `new`, keys and values of one token per row, written at the row's position.

    A position past the last entry writes nothing.
    """

    def write(layer: Layer, added: Layer) -> dict[str, jax.Array]:
        rows_B = jnp.arange(positions_B.shape[0])
        stored = _stored(added, SCALES["keys"] in layer)
        return {name: _put(leaf, rows_B, positions_B, stored[name][:, :, 0]) for name, leaf in layer.items()}

    return _each_layer(jax.vmap(write) if stacked else write, cache, new)


def _put(leaf: jax.Array, rows_B: jax.Array, positions_B: jax.Array, new: jax.Array) -> jax.Array:
    return leaf.at[rows_B, :, positions_B].set(new, mode="drop", unique_indices=True)


def _each_layer(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of layers with each layer replaced by function(layer, *(the same layer of each other tree))."""
    if "keys" in tree:
        return function(tree, *others)
    return {name: _each_layer(function, tree[name], *(other[name] for other in others)) for name in tree}


def _stored(layer: Layer, quantised: bool) -> dict[str, jax.Array]:
    """Keys and values [B, T, G, C] in the form of a cache: [B, G, T, C], with scales if quantised."""
    stored = {name: layer[name].transpose(0, 2, 1, 3) for name in SCALES}
    if not quantised:
        return stored
    for name, scales in SCALES.items():
        stored[name], stored[scales] = _quantised(stored[name].astype(jnp.float32))
    return stored


def _quantised(x_BGTC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [B, G, T, C], fp32 scales [B, G, T]): the largest magnitude of each token and head becomes 127."""
    scales_BGT = jnp.max(jnp.abs(x_BGTC), axis=-1) / LARGEST_INT8
    whole = jnp.round(x_BGTC / jnp.where(scales_BGT > 0, scales_BGT, 1.0)[..., None])
    return whole.astype(jnp.int8), scales_BGT
