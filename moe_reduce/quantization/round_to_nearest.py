"""Round-to-nearest quantisation of a model's matrices, without calibration."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import Scheme
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, counts_by_component, parameters
from moe_reduce.models.weights import is_quantised
from moe_reduce.models.weights import quantise as quantise_matrix
from moe_reduce.models.weights.scales import Ranges, extremes

KEPT = ("router",)


def quantise(model: Model, chosen: Mapping[str, Scheme], ranges: Ranges = extremes) -> Model:
    """The model with the matrices of some components in their scheme; real or abstract leaves alike.

    chosen: scheme by component (see `counts_by_component`). Norms, biases and gains are no matrices and always stay.
    ranges: chooses the range of values that a scale covers (clipping.py). Raises UserError for a component that the
    model lacks, a scheme that does not fit a matrix, or a model that is quantised.
    """
    flat = trees.flatten(model.params)
    by_path = schemes_by_path(model.config, chosen)
    if any(is_quantised(flat[path]) for path in by_path):
        raise UserError("the model is quantised already: quantise the model that it was made from")
    records = {record.path: record for record in parameters(model.config)}
    leaves = {}
    for path, scheme in by_path.items():
        run = partial(quantise_matrix, record=records[path], scheme=scheme, ranges=ranges)
        abstract = isinstance(flat[path], jax.ShapeDtypeStruct)
        leaves[path] = (jax.eval_shape if abstract else _run)(run, flat[path])
    return dataclasses.replace(model, params=trees.update(model.params, leaves))


def every_component(config: ModelConfig, scheme: Scheme, keep: Collection[str] = KEPT) -> dict[str, Scheme]:
    """One scheme for all components that have matrices but those in `keep`; UserError for a component of no model."""
    known = counts_by_component(config)
    for name in keep:
        if name not in known and name not in KEPT:
            raise UserError(f"keep: the model has no {name!r}; it has {', '.join(known)}")
    return {record.component: scheme for record in _matrices(config) if record.component not in keep}


def schemes_by_path(config: ModelConfig, chosen: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Scheme by path of each matrix of the components chosen; UserError for one that is missing or does not fit."""
    known = dict.fromkeys(record.component for record in _matrices(config))
    for name in chosen:
        if name not in known:
            raise UserError(f"the model has no matrices of {name!r} to quantise; it has {', '.join(known)}")
    return {
        record.path: chosen[record.component].fitted(record.matrix_shape[0], record.path)
        for record in _matrices(config)
        if record.component in chosen
    }


def _matrices(config: ModelConfig) -> list[Parameter]:
    return [record for record in parameters(config) if record.is_matrix]


def _run(function: Callable[..., Any], leaf: Any) -> Any:
    return jax.jit(function)(leaf)
