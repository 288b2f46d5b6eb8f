"""Adapter into base, for good: W' = W + ΔW in fp32, in one fixed order, and no trace of the adapter is left."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import Adapter, check_fits, trained
from moe_reduce.adapters.targets import Target, targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.models.deltas import ADAPTER, SMALLEST_SQUARE, srht_transposed
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.models.products import wide

ORDER = "(core · S_in), then S_outᵀ · (…), then scale, then W + ΔW; all in fp32"


def merge(model: Model, adapter: Adapter) -> Model:
    """The base with the adapter's change added to its matrices, and a link of its chain that says so.

    The model may have this adapter active. ΔW is formed here and only here. Raises UserError when the adapter does not
    fit, or has been merged into this model before.
    """
    base = unmerge(model) if ADAPTER in model.params else model
    # by what it changes too: PEFT's form of an adapter has another config
    identity, change = digest(adapter), projections.digest(_leaves(adapter))
    known = [step.arguments for step in model.chain if step.command == "merge"]
    if any(identity == one["adapter"] or ("change" in one and change == one["change"]) for one in known):
        raise UserError("this adapter has been merged into this model before: merge it into its base instead")
    check_fits(adapter, base.config)
    flat, changes = trees.flatten(base.params), trees.flatten(adapter.tree)
    leaves = {}
    for target in targets_of(adapter.config, base.config):
        below = f"{target.path}/"
        mine = {path.removeprefix(below): leaf for path, leaf in changes.items() if path.startswith(below)}
        # compiled, so that a sharded leaf stays where it lies
        leaves[target.path] = jax.jit(partial(_merged, target))(flat[target.path], mine)
    total = parameter_count(base.config)
    arguments = {"adapter": identity, "change": change, "config": to_dict(adapter.config), "order": ORDER}
    step = Step("merge", arguments, (), total, total)
    return dataclasses.replace(base, params=trees.update(base.params, leaves), chain=(*base.chain, step))


def unmerge(model: Model) -> Model:
    """The base again, of a model whose adapter is active; raises UserError once it is merged, which is for good."""
    if ADAPTER not in model.params:
        raise UserError("no adapter is active in this model, and a merged one cannot be taken out again: load the base")
    return dataclasses.replace(model, params={key: value for key, value in model.params.items() if key != ADAPTER})


def digest(adapter: Adapter) -> str:
    """SHA-256 of the config, the trained leaves and their scales."""
    total = hashlib.sha256(json.dumps(to_dict(adapter.config), sort_keys=True).encode())
    own = {p: leaf for p, leaf in _leaves(adapter).items() if trained(adapter.config, p) or p.endswith("/scale")}
    total.update(projections.digest(own).encode())
    return total.hexdigest()


def _leaves(adapter: Adapter) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(adapter.tree).items()}


def _merged(target: Target, leaf: jax.Array, changes: Mapping[str, Any]) -> jax.Array:
    """The leaf with each of its matrices changed, a layer at a time."""
    if target.layers is None:
        return _changed(leaf, target, changes)
    layers = np.asarray(target.layers)
    mine = {name: value for name, value in changes.items() if name != "layer_numbers"}
    changed = jax.lax.map(lambda layer: _changed(layer[0], target, layer[1]), (leaf[layers], mine))
    return leaf.at[layers].set(changed, unique_indices=True)


def _changed(matrices: jax.Array, target: Target, changes: Mapping[str, Any]) -> jax.Array:
    if target.experts is None:
        return _matrix(matrices, target, changes)
    # projections of SkeMA are of the layer, and everything else an expert has of its own
    axes = {name: 0 if value.ndim == 3 else None for name, value in changes.items()}
    return jax.vmap(lambda w, one: _matrix(w, target, one), in_axes=(0, axes))(matrices, dict(changes))


def delta(target: Target, changes: Mapping[str, Any], dtype: Any = jnp.float32) -> jax.Array:
    """ΔW of one matrix, [O, I], in the fixed order."""
    inward, outward = (_dense(changes, side, size, dtype) for side, size in _sides(target))
    core = None
    if "core" in changes:
        core = changes["core"].astype(dtype)
    elif "core_left" in changes:
        core = _product(changes["core_left"].astype(dtype), changes["core_right"].astype(dtype))
    inner = inward if core is None else _product(core, inward)
    return _product(outward.T, inner) * changes["scale"].astype(dtype)


def _matrix(w: jax.Array, target: Target, changes: Mapping[str, Any]) -> jax.Array:
    dtype = wide(w.dtype)
    w_OI = w.astype(dtype).reshape(target.inputs, target.outputs).T + delta(target, changes, dtype)
    if "magnitude" in changes:
        length_O1 = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w_OI), axis=1, keepdims=True), SMALLEST_SQUARE))
        w_OI = w_OI * (changes["magnitude"].astype(dtype)[:, None] / length_O1)
    return w_OI.T.reshape(w.shape).astype(w.dtype)


def _sides(target: Target) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("in", target.inputs), ("out", target.outputs)


def _dense(changes: Mapping[str, Any], side: str, size: int, dtype: Any) -> jax.Array:
    """S of one side, [k, size]."""
    if f"{side}/matrix" in changes:
        matrix = changes[f"{side}/matrix"].astype(dtype)
        return matrix.T if side == "in" else matrix
    signs, rows = changes[f"{side}/signs"].astype(dtype), changes[f"{side}/rows"]
    return srht_transposed(jnp.eye(rows.shape[0], dtype=dtype), signs, rows, size)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
