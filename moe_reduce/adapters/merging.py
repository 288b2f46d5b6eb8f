"""Merging an adapter into its base: W' = W + ΔW in fp32, in one fixed order."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import Adapter, check_fits, trained
from moe_reduce.adapters.leaves import is_abstract
from moe_reduce.adapters.replacements import applied, named
from moe_reduce.adapters.targets import Target, targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.models import weights
from moe_reduce.models.deltas import ADAPTER, SMALLEST_SQUARE, srht_transposed
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.models.products import accumulation_dtype

Delta = Mapping[str, Any]  # ΔW of one target in factored form (models/deltas.py)
ORDER = "(core · S_in), then S_outᵀ · (…), then scale, then W + ΔW; all in fp32"


def merge(model: Model, adapter: Adapter) -> Model:
    """The base with ΔW added to its matrices; a step in its chain records the merge.

    The adapter may be active in the model. Quantised matrices become float32. With abstract leaves the result is
    abstract, and its step has no hashes. Raises UserError if the adapter does not fit, or was merged into this model
    before.
    """
    base = unmerge(model) if ADAPTER in model.params else model
    own = named(adapter.replaced)
    # a copy of the adapter in PEFT's format has another config and thus another digest, but the same leaves
    hashes = {"adapter": digest(adapter), "change": _digest_of_leaves(trees.flatten(adapter.tree) | own)}
    for step in base.chain:
        if step.command == "merge" and any(value and value == step.arguments.get(key) for key, value in hashes.items()):
            raise UserError("this adapter has been merged into this model before: merge it into its base instead")
    check_fits(adapter, base.config)
    replaced = applied(base.params, adapter.replaced)
    flat, merged = trees.flatten(replaced), {}
    for target in targets_of(adapter.config, base.config):
        merged[target.path] = _merged(target, flat[target.path], delta_of(adapter, target))
    total = parameter_count(base.config)
    arguments = hashes | {"config": to_dict(adapter.config), "order": ORDER}
    step = Step("merge", arguments, (), total, total)
    return dataclasses.replace(base, params=trees.update(replaced, merged), chain=(*base.chain, step))


def requantised(merged: Model, base: Model, adapter: Adapter) -> Model:
    """The merged model with the matrices that were quantised in the base rounded to nearest in the same schemes.

    Layers that the adapter leaves out keep their codes. Returns `merged` itself if the adapter changed no quantised
    matrix.
    """
    before, after = trees.flatten(base.params), trees.flatten(merged.params)
    found = {
        target.path: _requantised(target, after[target.path], before[target.path])
        for target in targets_of(adapter.config, base.config)
        if weights.is_quantised(before[target.path])
    }
    return dataclasses.replace(merged, params=trees.update(merged.params, found)) if found else merged


def unmerge(model: Model) -> Model:
    """The base of a model with an active adapter. Raises UserError if none is active: a merge cannot be undone.

    Parameters that the adapter replaced (biases and whole matrices in files of PEFT) keep the adapter's values.
    """
    if ADAPTER not in model.params:
        raise UserError("this model has no active adapter, and a merge cannot be undone: load the base")
    return dataclasses.replace(model, params={key: value for key, value in model.params.items() if key != ADAPTER})


def digest(adapter: Adapter) -> str | None:
    """SHA-256 of the config, the trained leaves and their scales; None for abstract or traced leaves."""
    chosen = {
        path: leaf
        for path, leaf in trees.flatten(adapter.tree).items()
        if trained(adapter.config, path) or path.endswith("/scale")
    }
    leaves = _digest_of_leaves(chosen | named(adapter.replaced))
    if leaves is None:
        return None
    config = json.dumps(to_dict(adapter.config), sort_keys=True)
    return hashlib.sha256(config.encode() + leaves.encode()).hexdigest()


def delta_of(adapter: Adapter, target: Target) -> dict[str, Any]:
    """ΔW of one target in factored form, stacked over its layers."""
    node: dict[str, Any] = adapter.tree
    for key in target.path.split("/"):
        node = node[key]
    return {name: leaf for name, leaf in node.items() if name != "layer_numbers"}


def dense_delta(target: Target, delta: Delta, dtype: Any = jnp.float32) -> jax.Array:
    """ΔW of one matrix [O, I], multiplied in the fixed order."""
    inward = _dense_side(delta["in"], "in", target.in_features, dtype)
    outward = _dense_side(delta["out"], "out", target.out_features, dtype)
    core = None
    if "core" in delta:
        core = delta["core"].astype(dtype)
    elif "core_left" in delta:
        core = _product(delta["core_left"].astype(dtype), delta["core_right"].astype(dtype))
    inner = inward if core is None else _product(core, inward)
    return _product(outward.T, inner) * delta["scale"].astype(dtype)


def _digest_of_leaves(tree: trees.Tree) -> str | None:
    flat = trees.flatten(tree)
    if any(is_abstract(leaf) or isinstance(leaf, Tracer) for leaf in flat.values()):
        return None  # no values to hash
    return projections.digest({path: np.asarray(leaf) for path, leaf in flat.items()})


def _merged(target: Target, weight: Any, delta: Delta) -> Any:
    """The target's parameter with ΔW added to its matrices."""
    run = partial(_merged_layers, target)
    if is_abstract((weight, delta)):
        return jax.eval_shape(run, weight, delta)
    return jax.jit(run)(weight, delta)  # compiled, so that a sharded weight keeps its sharding


def _merged_layers(target: Target, weight: Any, delta: Delta) -> jax.Array:
    if weights.is_quantised(weight):
        weight = weights.dequantised(weight, jnp.float32)
    if target.layers is None:
        return _merged_layer(target, weight, delta)
    layers = np.asarray(target.layers)
    merged = jax.lax.map(lambda pair: _merged_layer(target, *pair), (weight[layers], delta))  # one layer at a time
    return weight.at[layers].set(merged, unique_indices=True)


def _requantised(target: Target, matrix: Any, before: Any) -> Any:
    """A merged parameter in the scheme that it had before."""

    def run(matrix: jax.Array, before: Any) -> Any:
        value = weights.quantise(matrix, target.parameter, before.scheme)
        if target.layers is None:
            return value
        layers = np.asarray(target.layers)
        return jax.tree.map(lambda kept, new: kept.at[layers].set(new[layers], unique_indices=True), before, value)

    return jax.eval_shape(run, matrix, before) if is_abstract((matrix, before)) else jax.jit(run)(matrix, before)


def _merged_layer(target: Target, weight: jax.Array, delta: Delta) -> jax.Array:
    if target.experts is None:
        return _merged_matrix(target, weight, delta)
    # SkeMA's projections are common to the experts of a layer; all other leaves have an expert axis
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, delta)
    return jax.vmap(partial(_merged_matrix, target), in_axes=(0, axes))(weight, delta)


def _merged_matrix(target: Target, w: jax.Array, delta: Delta) -> jax.Array:
    dtype = accumulation_dtype(w.dtype)
    w_OI = w.astype(dtype).reshape(target.in_features, target.out_features).T + dense_delta(target, delta, dtype)
    if "magnitude" in delta:
        norm_O1 = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w_OI), axis=1, keepdims=True), SMALLEST_SQUARE))
        w_OI = w_OI * (delta["magnitude"].astype(dtype)[:, None] / norm_O1)
    return w_OI.T.reshape(w.shape).astype(w.dtype)


def _dense_side(factor: Delta, side: str, size: int, dtype: Any) -> jax.Array:
    """A, Bᵀ, S_in or S_out of one matrix, [K, size]."""
    if "matrix" in factor:
        matrix = factor["matrix"].astype(dtype)
        return matrix.T if side == "in" else matrix
    signs, rows = factor["signs"].astype(dtype), factor["rows"]
    return srht_transposed(jnp.eye(rows.shape[0], dtype=dtype), signs, rows, size)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
