"""The key/value cache: keys and values of earlier tokens, so that a new token need not recompute them.

A cache is a pytree that enters as the variable collection `CACHE`, under the paths of the attention modules. These
modules read the cache and sow keys and values of new tokens as the collection `KEYS_VALUES`; the caller writes them to
the cache. Entry p of a row holds its token at position p, so positions alone determine the mask
(attention/visibility.py). A cache keeps all positions, even those that no later query sees, as with a sliding window.
Each layer has, for P entries (with a leading N if layers are stacked):

    keys, values              [B, G, P, C], in the compute dtype, int8 or fp8 (e4m3). Heads come before entries, so that
                              products need no transposed copy; G heads, not H (GQA, arXiv:2305.13245). For int4
                              [B, G, P, C/2] bytes, whose low bits hold the first half of the head, plus 8
    key_scales, value_scales  [B, G, P] fp32, for a quantised cache only: the number that 1 stands for

A layer with linear attention has a state instead (attention/linear.py), which no dtype of a cache changes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.errors import UserError
from moe_reduce.core.generate_config import CacheDtype
from moe_reduce.core.schemes import Code
from moe_reduce.models.weights.codes import nearest
from moe_reduce.models.weights.scales import SYMMETRIC

CACHE = "cache"
KEYS_VALUES = "keys_values"
STATE, HISTORY = "state", "history"  # of a layer with linear attention
SCALES = {"keys": "key_scales", "values": "value_scales"}
Layer = Mapping[str, jax.Array]


def layer_of(module: nn.Module) -> Layer | None:
    """Cache of the layer of an attention module; None if the call has no cache."""
    if not module.has_variable(CACHE, "keys"):
        return None
    names = (*SCALES, *(name for name in SCALES.values() if module.has_variable(CACHE, name)))
    return {name: module.get_variable(CACHE, name) for name in names}


def state_of(module: nn.Module) -> Layer | None:
    """State of the layer of a module of linear attention; None if the call has no cache."""
    if not module.has_variable(CACHE, STATE):
        return None
    return {name: module.get_variable(CACHE, name) for name in (STATE, HISTORY)}


def of_prompts(new: Mapping[str, Any], entries: int, dtype: CacheDtype, stacked: bool) -> dict[str, Any]:
    """A cache of `entries` >= T entries that starts with `new`, the keys and values of T tokens.

    UserError for int4 and heads of an odd width.
    """

    def filled(layer: Layer) -> Layer:
        if STATE in layer:
            return layer
        spare = entries - layer["keys"].shape[1]
        return {name: _padded(leaf, spare) for name, leaf in _stored(layer, dtype).items()}

    return _each_layer(jax.vmap(filled) if stacked else filled, new)


def _padded(leaf: jax.Array, spare: int) -> jax.Array:
    """A leaf with `spare` more entries, on the third axis."""
    return jnp.pad(leaf, [(0, spare if axis == 2 else 0) for axis in range(leaf.ndim)])


def written(cache: Mapping[str, Any], new: Mapping[str, Any], positions_B: jax.Array, stacked: bool) -> dict[str, Any]:
    """The cache with `new`, keys and values of one token per row, written at the row's position.

    A position past the last entry writes nothing. States are replaced.
    """

    def write(layer: Layer, added: Layer) -> Layer:
        if STATE in layer:
            return added
        rows_B = jnp.arange(positions_B.shape[0])
        stored = _stored(added, _dtype(layer))
        return {name: _put(leaf, rows_B, positions_B, stored[name][:, :, 0]) for name, leaf in layer.items()}

    return _each_layer(jax.vmap(write) if stacked else write, cache, new)


def _put(leaf: jax.Array, rows_B: jax.Array, positions_B: jax.Array, new: jax.Array) -> jax.Array:
    return leaf.at[rows_B, :, positions_B].set(new, mode="drop", unique_indices=True)


def _each_layer(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of layers with each layer replaced by function(layer, *(the same layer of each other tree))."""
    if "keys" in tree or STATE in tree:
        return function(tree, *others)
    return {name: _each_layer(function, tree[name], *(other[name] for other in others)) for name in tree}


def values(layer: Layer, name: str, dtype: Any) -> jax.Array:
    """Keys or values [B, G, P, C] in a dtype; those of a quantised cache are still to be multiplied by their scales."""
    held = layer[name]
    if held.dtype != jnp.uint8:
        return held.astype(dtype)
    return jnp.concatenate([(held & 15).astype(dtype), (held >> 4).astype(dtype)], axis=-1) - jnp.asarray(8, dtype)


def _dtype(layer: Layer) -> CacheDtype:
    if SCALES["keys"] not in layer:
        return "auto"
    names: dict[Any, CacheDtype] = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.uint8): "int4"}
    return names.get(jnp.dtype(layer["keys"].dtype), "fp8")


def _stored(layer: Layer, dtype: CacheDtype) -> dict[str, jax.Array]:
    """Keys and values [B, T, G, C] in the form of a cache: [B, G, T, C], with scales if quantised."""
    stored = {name: layer[name].transpose(0, 2, 1, 3) for name in SCALES}
    if dtype == "auto":
        return stored
    for name, scales in SCALES.items():
        stored[name], stored[scales] = _quantised(stored[name].astype(jnp.float32), dtype)
    return stored


def _quantised(x_BGTC: jax.Array, dtype: Code) -> tuple[jax.Array, jax.Array]:
    """(codes [B, G, T, C], fp32 scales [B, G, T]): each token and head covers its largest magnitude."""
    scales_BGT = jnp.max(jnp.abs(x_BGTC), axis=-1) / SYMMETRIC[dtype]
    codes = nearest(x_BGTC / jnp.where(scales_BGT > 0, scales_BGT, 1.0)[..., None], dtype)
    if dtype != "int4":
        return codes, scales_BGT
    if codes.shape[-1] % 2:
        raise UserError(f"an int4 cache needs heads of an even width, not {codes.shape[-1]}: choose int8")
    low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=-1)
    return low | (high << 4), scales_BGT
