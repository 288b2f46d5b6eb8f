"""Removal of experts: their matrices, router columns and biases are cut out; all other values stay bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, parameters
from moe_reduce.models.weights import Value, map_parts
from moe_reduce.reduction.selection import KeptExperts
from moe_reduce.reduction.transform import Leaves, expert_rows, moe_of, transform


def prune(model: Model, kept: KeptExperts) -> Model:
    """Keep these experts and remove all others; keeping all is the identity, bit for bit.

    kept: a row of expert numbers for each layer, or one row for a shared pool. Raises UserError when layers would keep
    different numbers of experts, which no configuration of a per-layer model can express, or fewer than are active for
    a token.
    """
    check_kept(model.config, kept)
    moe = dataclasses.replace(moe_of(model.config), experts=len(kept[0]))
    per_expert = [record for record in parameters(model.config) if record.expert_axis is not None]

    def keep(leaves: Leaves) -> Leaves:
        return {record.path: _keep(leaves[record.path], record, kept) for record in per_expert}

    return transform(model, dataclasses.replace(model.config, moe=moe), per_expert, keep, slices=True)


def check_kept(config: ModelConfig, kept: KeptExperts) -> None:
    """Raises UserError when a model cannot keep these experts."""
    moe, rows = moe_of(config), expert_rows(config)
    if len(kept) != rows:
        raise UserError(f"kept experts are given for {len(kept)} layers, the model has {rows}: give a row for each")
    sizes = {len(row) for row in kept}
    if len(sizes) > 1:
        raise UserError(
            f"layers would keep between {min(sizes)} and {max(sizes)} experts, which a per-layer model cannot express: "
            "use --scope=layer, or pool the model first"
        )
    if min(sizes) < moe.active:
        raise UserError(f"{min(sizes)} experts kept are fewer than the {moe.active} active for a token: keep more")
    for row in kept:
        _check_groups(row, moe)
        if list(row) != sorted(set(row)) or row[0] < 0 or row[-1] >= moe.experts:
            raise UserError(f"kept experts {row} are not ascending numbers below {moe.experts}: correct them")


def _check_groups(row: tuple[int, ...], moe: MoEConfig) -> None:
    """Raises UserError unless a row keeps equally many experts of each group that the router chooses among."""
    kept = [sum(index // (moe.experts // moe.groups) == group for index in row) for group in range(moe.groups)]
    if len(set(kept)) > 1:
        raise UserError(
            f"the router's groups of experts would keep between {min(kept)} and {max(kept)}: keep equally many of each "
            f"of the {moe.groups} groups"
        )


def _keep(value: Value, record: Parameter, kept: KeptExperts) -> Value:
    """Take the kept experts of a parameter; if there are several rows, row n is for layer n on the first axis."""

    def take(axes: tuple[int | None, ...], part: jax.Array) -> jax.Array:
        if record.axes.index("E") not in axes:
            raise UserError(f"{record.path} is quantised, and its experts share a scale: prune, then quantise")
        axis = axes.index(record.axes.index("E"))
        if len(kept) == 1:
            return jnp.take(part, np.asarray(kept[0]), axis=axis)
        return jnp.stack([jnp.take(part[layer], np.asarray(row), axis=axis - 1) for layer, row in enumerate(kept)])

    return map_parts(take, record, value)
