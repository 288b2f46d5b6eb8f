"""Banks: several adapters of one base side by side, so that each row of a batch runs with its own.

A bank is stored in params["adapters"], and batch["adapter"] names the entry of each row; models/deltas.py describes its
leaves. Adapters of other ranks are padded with zeros, and where an adapter does not change a matrix or a layer, its
entry is zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import Adapter, check_fits, trained
from moe_reduce.adapters.merging import delta_of
from moe_reduce.adapters.targets import Target, targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER, BANK
from moe_reduce.models.model import Model

SCALED = ("core", "core_left", "out/matrix")  # an entry's scale is multiplied into the first of these that it has
Leaves = dict[str, np.ndarray]  # of one adapter at one target, by path
Place = tuple[Target, Leaves]


def activate(model: Model, adapters: Sequence[Adapter | None]) -> Model:
    """The model with a bank of adapters, in this order; None is an entry that changes nothing.

    UserError for an adapter of another base, and for DoRA, which rescales whole matrices.
    """
    if ADAPTER in model.params or BANK in model.params:
        raise UserError("this model already has an active adapter: merge or unmerge it first")
    return dataclasses.replace(model, params=model.params | {BANK: stack(adapters, model.config)})


def stack(adapters: Sequence[Adapter | None], model: ModelConfig) -> dict[str, Any]:
    """The tree of a bank, from the trees of its adapters."""
    places: dict[str, list[Place | None]] = {}
    for number, adapter in enumerate(adapters):
        if adapter is None:
            continue
        check_fits(adapter, model)
        if adapter.config.method == "dora":
            raise UserError(f"adapter {number} is a DoRA, which cannot run beside others: give it alone, or merge it")
        if adapter.replaced:
            (path, _), *_ = adapter.replaced
            raise UserError(f"adapter {number} replaces {path}, which all rows share: give it alone, or merge it")
        for target in targets_of(adapter.config, model):
            leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(delta_of(adapter, target)).items()}
            places.setdefault(target.path, [None] * len(adapters))[number] = (target, leaves)
    if not places:
        raise UserError("a bank needs at least one adapter, and all of its entries are none")
    flat = {
        f"{path}/{name}": jnp.asarray(leaf) for path, found in places.items() for name, leaf in _stacked(found).items()
    }
    return trees.unflatten(flat)


def stack_alike(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The tree of a bank to train, from adapters of one configuration.

    Trained leaves are stacked as they are; all others are those of the first adapter, which the entries share.
    """
    flat = [trees.flatten(adapter.tree) for adapter in adapters]
    return trees.unflatten(
        {
            path: jnp.stack([leaves[path] for leaves in flat], axis=-3) if trained(adapters[0].config, path) else leaf
            for path, leaf in flat[0].items()
        }
    )


def entry(tree: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The tree of one adapter, from that of a bank."""
    if "scale" not in tree:
        return {name: entry(branch, number) for name, branch in tree.items()}
    shared = 2 + ("layer_numbers" in tree)  # most axes of a leaf that all entries share, as in deltas.bank_size
    return jax.tree.map(lambda leaf: jnp.take(leaf, number, -3) if leaf.ndim > shared else leaf, dict(tree))


def _stacked(places: list[Place | None]) -> Leaves:
    """Leaves of a bank at one target."""
    given = [place for place in places if place is not None]
    if not _alike(given):
        places = [None if place is None else (place[0], _low_rank(*place)) for place in places]
        given = [place for place in places if place is not None]
    layers = sorted({layer for target, _ in given for layer in target.layers or ()})
    names = [name for name in given[0][1] if name != "scale"]
    shared = {name for name in names if _equal(given, name)}
    found = {name: given[0][1][name] for name in shared}
    for name in names:
        if name not in shared:
            leaves = [None if place is None else _in_layers(*place, name, layers) for place in places]
            found[name] = _padded(leaves)
    found["scale"] = np.ones([len(layers)] if layers else [], np.float32)
    return found | ({"layer_numbers": np.asarray(layers, np.int32)} if layers else {})


def _alike(given: list[Place]) -> bool:
    """True if the deltas have the same leaves, and fixed Hadamard transforms, which cannot be padded, are equal."""
    names = {frozenset(leaves) for _, leaves in given}
    fixed = [name for name in given[0][1] if name.endswith(("/signs", "/rows"))]
    return len(names) == 1 and all(_equal(given, name) for name in fixed)


def _equal(given: list[Place], name: str) -> bool:
    """True if a leaf of projections is the same in all adapters, so that the bank needs it once."""
    first_target, first = given[0]
    is_projection = "core" in first or "core_left" in first
    return (
        is_projection
        and name.startswith(("in/", "out/"))
        and all(target.layers == first_target.layers for target, _ in given)
        and all(np.array_equal(leaves[name], first[name]) for _, leaves in given)
    )


def _low_rank(target: Target, leaves: Leaves) -> Leaves:
    """A delta in the form of LoRA: projections are written out, and the core is multiplied into `out`."""
    inward, outward = (_matrix(leaves, side, target) for side in ("in", "out"))
    core = leaves["core_left"] @ leaves["core_right"] if "core_left" in leaves else leaves.get("core")
    if core is not None and target.experts is not None:  # the experts of a layer share the projections
        inward, outward = (np.repeat(side[..., None, :, :], target.experts, -3) for side in (inward, outward))
    if core is not None:
        outward = np.swapaxes(core, -1, -2) @ outward
    return {"in/matrix": inward, "out/matrix": outward, "scale": leaves["scale"]}


def _matrix(leaves: Leaves, side: str, target: Target) -> np.ndarray:
    """`in` [N, I, k] or `out` [N, k, O] as a matrix."""
    if f"{side}/matrix" in leaves:
        return leaves[f"{side}/matrix"]
    size = target.in_features if side == "in" else target.out_features
    signs, rows = leaves[f"{side}/signs"], leaves[f"{side}/rows"]
    stack = signs.shape[:-1]
    pairs = zip(signs.reshape(-1, signs.shape[-1]), rows.reshape(-1, rows.shape[-1]), strict=True)
    dense = np.stack([projections.dense({"signs": sign, "rows": row}, size) for sign, row in pairs])
    dense = dense.reshape(*stack, *dense.shape[1:]).astype(np.float32)
    return np.swapaxes(dense, -1, -2) if side == "in" else dense


def _in_layers(target: Target, leaves: Leaves, name: str, layers: list[int]) -> np.ndarray:
    """A leaf with its scale, and with zeros in the layers that the adapter leaves as they are."""
    leaf = leaves[name]
    if name == next(factor for factor in SCALED if factor in leaves):
        scale = leaves["scale"]
        leaf = leaf * scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim))
    if target.layers is None or list(target.layers) == layers:
        return leaf
    spread = np.zeros((len(layers), *leaf.shape[1:]), leaf.dtype)
    spread[[layers.index(layer) for layer in target.layers]] = leaf
    return spread


def _padded(leaves: list[np.ndarray | None]) -> np.ndarray:
    """Leaves of equal or smaller rank, stacked on axis -3; None becomes zeros."""
    known = [leaf for leaf in leaves if leaf is not None]
    shape = tuple(max(sizes) for sizes in zip(*(leaf.shape for leaf in known), strict=True))

    def pad(leaf: np.ndarray | None) -> np.ndarray:
        if leaf is None:
            return np.zeros(shape, np.float32)
        return np.pad(leaf, [(0, size - have) for size, have in zip(shape, leaf.shape, strict=True)])

    return np.stack([pad(leaf) for leaf in leaves], axis=-3)
