"""Fewer layers, and Block Influence, which ranks layers by how much they change the residual stream."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.attention_config import LINEAR, LinearAttention
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.model_config import FULL, WINDOWED
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, parameters
from moe_reduce.models.weights import Value, map_parts
from moe_reduce.reduction.transform import Leaves, transform
from moe_reduce.training.task import Batch


def drop_layers(model: Model, layers: Sequence[int]) -> Model:
    """Remove the layers with these numbers, which start from 0; a shared pool keeps all of its experts.

    Raises UserError when a number is out of range or repeated, or when no layer would remain.
    """
    total = model.config.layers
    for layer in layers:
        if not 0 <= layer < total:
            raise UserError(f"layers: {layer} is not in 0..{total - 1}, the layers of this model: name others")
    if len(set(layers)) < len(layers):
        raise UserError(f"layers={list(layers)} names one twice: name each layer once")
    if len(layers) == total:
        raise UserError(f"layers names all {total} layers: leave at least one")
    first = model.config.dense_layers
    if min(layers, default=first) < first:
        raise UserError(f"layers={list(layers)}: the first {first} have no experts and cannot be dropped: name others")
    kept = [layer for layer in range(total) if layer not in layers]
    if first and len(kept) == first:
        raise UserError(f"layers names all {total - first} layers with experts: leave at least one")
    stacked = [record for record in parameters(model.config) if record.stacked]

    def drop(leaves: Leaves) -> Leaves:
        left = [record for record in stacked if set(record.layers) & set(kept)]
        return {record.path: _kept(leaves[record.path], record, kept) for record in left}

    return transform(model, _with_layers(model.config, kept), stacked, drop, slices=True)


def _kept(value: Value, record: Parameter, kept: list[int]) -> Value:
    """The kept layers of a stack."""
    places = np.array([record.layers.index(layer) for layer in kept if layer in record.layers])
    return map_parts(lambda _, part: part[places], record, value)


def _with_layers(config: ModelConfig, kept: list[int]) -> ModelConfig:
    """The configuration of the kept layers; a pattern that has become uniform is left out."""
    config = dataclasses.replace(config, layers=len(kept), linear=_linear(config, kept))
    if config.window_pattern is None:
        return config
    pattern = "".join(config.window_pattern[layer] for layer in kept)
    if FULL not in pattern:
        return dataclasses.replace(config, window_pattern=None)
    window = config.sliding_window if WINDOWED in pattern else None
    return dataclasses.replace(config, sliding_window=window, window_pattern=None if window is None else pattern)


def _linear(config: ModelConfig, kept: list[int]) -> LinearAttention | None:
    """Linear attention of the kept layers; None if none of them has it."""
    if config.linear is None:
        return None
    pattern = "".join(config.linear.pattern[layer] for layer in kept)
    return dataclasses.replace(config.linear, pattern=pattern) if LINEAR in pattern else None


def block_influence(model: Model, batches: Iterable[Batch]) -> np.ndarray:
    """Measure BI_l = 1 − E[cos(x_l, x_{l+1})] of each layer, float64 [N] (ShortGPT, arXiv:2403.03853).

    x_l is the residual stream that enters layer l and x_{l+1} the one that leaves it, without the final norm. E is the
    mean over positions, weighted by the batch's `weights`. A layer of influence 0 turns no hidden state; it may only
    scale it. Raises UserError when all weights are 0.
    """

    @jax.jit
    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden = model.with_params(params).apply(batch, collect=("hidden",)).collected["hidden"]
        cosine_NBT = _cosine(hidden["block_input"], hidden["block_output"])
        weights_BT = jnp.asarray(batch["weights"])
        return jnp.einsum("NBT,BT->N", cosine_NBT, weights_BT), jnp.sum(weights_BT)

    cosine_N, weight = np.zeros(model.config.layers), 0.0
    for batch in batches:
        added_N, added = jax.device_get(sums(model.params, batch))
        cosine_N, weight = cosine_N + np.asarray(added_N, np.float64), weight + float(added)
    if weight == 0:
        raise UserError("data holds no position to measure Block Influence on: give more text")
    return 1 - cosine_N / weight


def _cosine(left: jax.Array, right: jax.Array) -> jax.Array:
    """Cosine similarity of the vectors on the last axis, fp32; 0 where one of them is zero."""
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    lengths = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
    return jnp.sum(left * right, axis=-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
