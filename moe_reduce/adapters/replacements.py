"""Parameters that an adapter replaces: biases, and whole matrices that PEFT trains beside a LoRA (modules_to_save)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce import families
from moe_reduce.adapters.leaves import is_abstract
from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import ParameterLayout
from moe_reduce.models.weights import is_quantised

Slot = tuple[str, tuple[int, ...]]  # path of a parameter, and the index of a layer (and of an expert) in it
Replacements = Mapping[Slot, np.ndarray]


def places(model: ModelConfig) -> dict[str, list[tuple[ParameterLayout, tuple[int, ...]]]]:
    """Parameters, and indices in them, that each tensor of a model directory holds, by the tensor's name."""
    found: dict[str, list[tuple[ParameterLayout, tuple[int, ...]]]] = {}
    for leaf in families.parameter_layouts(model):
        for index in np.ndindex(leaf.stacked):
            found.setdefault(leaf.name(index), []).append((leaf, index))
    return found


def applied(params: dict[str, Any], replacements: Replacements) -> dict[str, Any]:
    """Parameters with the replaced values in the dtypes of the base; abstract ones stay as they are.

    UserError for a quantised parameter.
    """
    if not replacements or is_abstract(params):
        return params
    flat, changed = trees.flatten(params), {}
    for (path, index), value in replacements.items():
        old = changed.get(path, flat[path])
        if is_quantised(old):
            raise UserError(f"this adapter replaces {path}, which is quantised in this base: give a base that is not")
        changed[path] = old.at[index].set(jnp.asarray(value, old.dtype))
    return trees.update(params, changed)


def named(replacements: Replacements) -> dict[str, np.ndarray]:
    """The values by one text each, such as unembedding/table or layers/mlp/up_bias:3."""
    return {":".join([path, *map(str, index)]): value for (path, index), value in replacements.items()}
