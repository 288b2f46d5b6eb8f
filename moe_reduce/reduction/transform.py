"""Shared mechanism of all reductions: one function changes the parameters of a real model or of an abstract one.

A transform states the new configuration, the records of the parameters that it replaces, and a function from their
values to the new values. The function runs as it is on arrays, and under jax.eval_shape on abstract leaves
(jax.ShapeDtypeStruct), so that planning a reduction runs the same code.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, by_path, stored_params
from moe_reduce.models.weights import is_quantised

Leaves = dict[str, Any]  # parameter values by path


def transform(
    model: Model,
    config: ModelConfig,
    replaced: Iterable[Parameter],
    change: Callable[[Leaves], Leaves],
    slices: bool = False,
) -> Model:
    """Return a model with this configuration, in which new parameters replace those in `replaced`.

    replaced: records of the model's present parameters. change: maps their values, by path, to the values of the new
    parameters, by path in the new configuration. All other parameters stay as they are. slices: True if `change`
    only selects rows, which works on quantised values as well; if False, a quantised value raises UserError.
    """
    flat = trees.flatten(model.params)
    replaced_values = {record.path: flat.pop(record.path) for record in replaced}
    quantised = sorted(path for path, value in replaced_values.items() if is_quantised(value))
    if quantised and not slices:
        raise UserError(f"{quantised[0]} is quantised, and this reduction changes its values: reduce, then quantise")
    changed = _apply(change, replaced_values)
    wanted = by_path(config)
    for path, leaf in changed.items():
        assert tuple(leaf.shape) == wanted[path].shape, f"{path} has shape {leaf.shape}, not {wanted[path].shape}"
    return dataclasses.replace(model, config=config, params=trees.unflatten(flat | changed))


def _apply(function: Callable[[Leaves], Leaves], leaves: Leaves) -> Leaves:
    """Call a function of parameter values; if any value is abstract, evaluate only the shapes and dtypes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(leaves)):
        return jax.eval_shape(function, leaves)
    return function(jax.tree.map(jnp.asarray, leaves))


def abstract_model(config: ModelConfig, dtype: Any = jnp.float32, chain: tuple[Step, ...] = ()) -> Model:
    """Return a model with abstract leaves of this dtype, or of fp32 for parameters that runs always keep in fp32."""
    return Model(config, stored_params(config, dtype), ExecutionConfig(), chain=chain)


def moe_of(config: ModelConfig) -> MoEConfig:
    """Return the configuration of the experts; raises UserError for a dense model."""
    if config.moe is None:
        raise UserError("a dense model has no experts: give a mixture of experts")
    return config.moe


def expert_rows(config: ModelConfig) -> int:
    """Number of rows in the (row, index) numbers of experts: one for each layer with experts, or 1 for a pool."""
    return 1 if moe_of(config).placement == "shared" else config.expert_layers


def expert_count(config: ModelConfig) -> int:
    """Number of experts in the whole model, over all layers."""
    return expert_rows(config) * moe_of(config).experts
