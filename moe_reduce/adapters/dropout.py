"""Dropout on the input of an adapter while it trains, as in LoRA (arXiv:2106.09685); the base sees the whole input."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core.config import AdapterConfig
from moe_reduce.models.deltas import ADAPTER


def while_training(config: AdapterConfig | None, params: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters whose active adapter drops a share of its inputs; unchanged without an adapter or without dropout.

    batch: of a training step, whose first draw and the adapter's seed decide what is dropped, so that a resumed run
    drops the same. Micro-batches have draws of their own.
    """
    if config is None or config.dropout == 0:
        return dict(params)
    key = key_of_step(config.seed, batch)
    return dict(params) | {ADAPTER: _with_keys(params[ADAPTER], config.dropout, key, ADAPTER)}


def key_of_step(seed: int, batch: Mapping[str, Any]) -> jax.Array:
    """Random key of a training step or micro-batch, from its first draw and a seed."""
    return jax.random.fold_in(jax.random.key(seed), batch["draws"][0])


def _with_keys(tree: Mapping[str, Any], share: float, key: jax.Array, path: str) -> dict[str, Any]:
    """The tree with a key for every layer of every delta."""
    if "scale" not in tree:
        return {name: _with_keys(branch, share, key, f"{path}/{name}") for name, branch in tree.items()}
    layers = tree["scale"].shape
    keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), layers)
    dropout = {"key": jax.random.key_data(keys), "share": jnp.full(layers, share, jnp.float32)}
    return dict(tree) | {"dropout": dropout}
