"""Keeping some experts and leaving out the others: exact slices of experts, router columns and biases."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path, lookup
from moe_reduce.reduction.selection import Kept


def prune(model: Model, kept: Kept) -> Model:
    """A model of the kept experts only; keeping all is the identity, bit for bit.

    Rows of `kept` are layers, or one row for a shared pool. Raises UserError when layers would keep different numbers
    (no config of a per-layer model says that: pool first), or fewer than are active for a token.
    """
    moe = model.config.moe
    if moe is None:
        raise UserError("a dense model has no experts to prune")
    check_kept(moe, kept, model.config.layers)
    trees.select(model.params, r"(layers/)?experts/(gate|up|down)", expect=3)
    known = by_path(model.config)
    params = trees.map_with_path(lambda path, leaf: _keep(lookup(known, path).expert_axis, leaf, kept), model.params)
    return dataclasses.replace(model, config=smaller_config(model.config, kept), params=params)


def smaller_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The architecture with the kept experts, as many in each row."""
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=len(kept[0])))


def check_kept(moe: MoEConfig, kept: Kept, layers: int) -> None:
    """Raises UserError when a model of these experts cannot keep these."""
    rows = 1 if moe.placement == "shared" else layers
    if len(kept) != rows:
        raise UserError(f"kept experts are given for {len(kept)} layers, the model has {rows} pools")
    sizes = {len(row) for row in kept}
    if len(sizes) > 1:
        raise UserError(
            f"layers would keep between {min(sizes)} and {max(sizes)} experts, which a per-layer model cannot say: "
            "use --scope=layer, or pool the model first"
        )
    if min(sizes) < moe.active:
        raise UserError(f"{min(sizes)} experts kept are fewer than the {moe.active} active for a token: keep more")
    for row in kept:
        if list(row) != sorted(set(row)) or row[0] < 0 or row[-1] >= moe.experts:
            raise UserError(f"kept experts {row} are not ascending numbers below {moe.experts}")


def _keep(axis: int | None, leaf: Any, kept: Kept) -> Any:
    """The kept slices of one leaf along its expert axis; leaves without experts are returned as they are."""
    if axis is None:
        return leaf
    if len(kept) == 1:
        return jnp.take(leaf, np.asarray(kept[0]), axis=axis)
    return jnp.stack([jnp.take(leaf[layer], np.asarray(row), axis=axis - 1) for layer, row in enumerate(kept)])
