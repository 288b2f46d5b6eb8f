"""Keys and values of what a decoder has read, so that a further token need not be computed with all before it.

A cache is a pytree that goes in as the variable collection `CACHE`, under the paths of the attention modules, and is
never written by them: what they make of new tokens comes out as the collection `KEYS_VALUES`, and whoever calls puts it
into the cache. Place s of a row holds its token at position s, so what a row may see follows from positions alone.
Of each layer (with a leading N where layers are stacked), for P places:

    keys, values              [B, G, P, C], in the compute dtype or int8. Heads come before places, so that products
                              read a cache as it lies; G heads and not H (GQA, arXiv:2305.13245)
    key_scales, value_scales  [B, G, P] fp32, of an int8 cache: what 1 stands for, by token and head
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.models import products

CACHE = "cache"
KEYS_VALUES = "keys_values"
LARGEST = 127  # of int8, the same on both sides of zero
SCALES = {"keys": "key_scales", "values": "value_scales"}
Layer = Mapping[str, jax.Array]


def layer_of(module: nn.Module) -> Layer | None:
    """The cache of an attention module's layer; None without one."""
    if not module.has_variable(CACHE, "keys"):
        return None
    names = (*SCALES, *(name for name in SCALES.values() if module.has_variable(CACHE, name)))
    return {name: module.get_variable(CACHE, name) for name in names}


def hand_out(module: nn.Module, k_BTGC: jax.Array, v_BTGC: jax.Array) -> None:
    """Sows what belongs into the cache, for those who ask."""
    last: Any = {"reduce_fn": lambda _, new: new, "init_fn": dict}  # no tuple of repeated calls
    module.sow(KEYS_VALUES, "keys", k_BTGC, **last)
    module.sow(KEYS_VALUES, "values", v_BTGC, **last)


def attention(q_BTHC, k_BTGC, v_BTGC, layer: Layer, positions_BT: jax.Array, form: str) -> jax.Array:
    """Softmax attention of T new tokens over the cache and, causally, over one another: [B, T, H, C].

    positions_BT: consecutive in each row. A row sees the places before its first position.
    """
    batch, time, heads, width = q_BTHC.shape
    groups, places = k_BTGC.shape[2], layer["keys"].shape[2]
    q_BGRTC = q_BTHC.reshape(batch, time, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    q_BGQC = q_BGRTC.reshape(batch, groups, -1, width)
    k_BGTC, v_BGTC = k_BTGC.transpose(0, 2, 1, 3), v_BTGC.transpose(0, 2, 1, 3)
    old_BGQP = _scaled(products.dot(q_BGQC, _computed(layer["keys"], q_BTHC), 1, 1, form, batch=2), layer, "keys")
    scores = jnp.concatenate([old_BGQP, products.dot(q_BGQC, k_BGTC, 1, 1, form, batch=2)], axis=-1) * width**-0.5
    past_BTP = jnp.broadcast_to(jnp.arange(places)[None, None] < positions_BT[:, :1, None], (batch, time, places))
    new_BTT = jnp.broadcast_to(jnp.tri(time, dtype=bool)[None], (batch, time, time))
    allowed = jnp.concatenate([past_BTP, new_BTT], axis=-1)[:, None, None]
    scores = scores.reshape(batch, groups, -1, time, places + time)
    shares = jax.nn.softmax(jnp.where(allowed, scores, jnp.float32(-1e30)), axis=-1)
    old_BGQP, new_BGQT = jnp.split(shares.reshape(*q_BGQC.shape[:3], -1), [places], axis=-1)
    old_BGQP = _scaled(old_BGQP, layer, "values").astype(q_BTHC.dtype)
    mixed_BGQC = products.dot(old_BGQP, _computed(layer["values"], q_BTHC), 1, 0, form, batch=2)
    mixed_BGQC = mixed_BGQC + products.dot(new_BGQT.astype(q_BTHC.dtype), v_BGTC, 1, 0, form, batch=2)
    mixed_BHTC = mixed_BGQC.astype(q_BTHC.dtype).reshape(batch, heads, time, width)
    return mixed_BHTC.transpose(0, 2, 1, 3)


def _computed(stored: jax.Array, like: jax.Array) -> jax.Array:
    return stored.astype(like.dtype)


def _scaled(products_BGQP: jax.Array, layer: Layer, name: str) -> jax.Array:
    """Times the scale of each place: on the products and not on the cache, of which a copy would be made."""
    return products_BGQP * layer[SCALES[name]][:, :, None] if SCALES[name] in layer else products_BGQP


def of_prompts(handed_out: Mapping[str, Any], places: int, quantised: bool, stacked: bool) -> dict[str, Any]:
    """A cache of so many places, at least T, that starts with the keys and values of T tokens, as `KEYS_VALUES`."""

    def filled(layer: Layer) -> dict[str, jax.Array]:
        spare = places - layer["keys"].shape[1]
        return {name: _padded(leaf, spare) for name, leaf in _entries(layer, quantised).items()}

    return _each_layer(jax.vmap(filled) if stacked else filled, handed_out)


def _padded(leaf: jax.Array, spare: int) -> jax.Array:
    """More places, on the third axis."""
    return jnp.pad(leaf, [(0, spare if axis == 2 else 0) for axis in range(leaf.ndim)])


def written(cache: Mapping[str, Any], handed_out: Mapping[str, Any], places_B: jax.Array, stacked: bool):
    """The cache with the keys and values of one token of each row, as `KEYS_VALUES`, at the row's place.

    A place behind the last one stands for none: nothing is written.
    """

    def write(layer: Layer, new: Layer) -> dict[str, jax.Array]:
        rows_B = jnp.arange(places_B.shape[0])
        entries = _entries(new, SCALES["keys"] in layer)
        return {name: _put(leaf, rows_B, places_B, entries[name][:, :, 0]) for name, leaf in layer.items()}

    return _each_layer(jax.vmap(write) if stacked else write, cache, handed_out)


def _put(leaf: jax.Array, rows_B: jax.Array, places_B: jax.Array, new: jax.Array) -> jax.Array:
    return leaf.at[rows_B, :, places_B].set(new, mode="drop", unique_indices=True)


def _each_layer(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """function(layer of the tree, and of the others), in the same places."""
    if "keys" in tree:
        return function(tree, *others)
    return {name: _each_layer(function, tree[name], *(other[name] for other in others)) for name in tree}


def _entries(layer: Layer, quantised: bool) -> dict[str, jax.Array]:
    """Keys and values [B, T, G, C] as they are stored: [B, G, T, C], with their scales."""
    entries = {name: layer[name].transpose(0, 2, 1, 3) for name in SCALES}
    if not quantised:
        return entries
    for name, scales in SCALES.items():
        entries[name], entries[scales] = _quantised(entries[name].astype(jnp.float32))
    return entries


def _quantised(x_BGTC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [B, G, T, C], fp32 scales [B, G, T]): of each token and head, the largest magnitude becomes 127."""
    scales_BGT = jnp.max(jnp.abs(x_BGTC), axis=-1) / LARGEST
    whole = jnp.round(x_BGTC / jnp.where(scales_BGT > 0, scales_BGT, 1.0)[..., None])
    return whole.astype(jnp.int8), scales_BGT
