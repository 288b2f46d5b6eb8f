"""Round-to-nearest quantisation of a model's matrices, without calibration."""

import dataclasses
from collections.abc import Collection
from functools import partial

import jax

from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import counts_by_component, parameters
from moe_reduce.models.weights import Int8, is_quantised

KEPT = ("router",)


def quantise_int8(model: Model, keep: Collection[str] = KEPT) -> Model:
    """The model with its matrices as int8, one fp32 scale for each output; real or abstract leaves alike.

    keep: components whose matrices stay as they are (see `counts_by_component`). Norms, biases and gains are no
    matrices and always stay. Raises UserError for a component that the model lacks, or a model that is quantised.
    """
    known = counts_by_component(model.config)
    for name in keep:
        if name not in known and name not in KEPT:
            raise UserError(f"keep: the model has no {name!r}; it has {', '.join(known)}")
    flat = trees.flatten(model.params)
    chosen = [record for record in parameters(model.config) if record.is_matrix and record.component not in keep]
    if any(is_quantised(flat[record.path]) for record in chosen):
        raise UserError("the model is quantised already: quantise the model that it was made from")
    leaves = {}
    for record in chosen:
        quantise = partial(Int8.quantise, record=record)
        abstract = isinstance(flat[record.path], jax.ShapeDtypeStruct)
        leaves[record.path] = (jax.eval_shape if abstract else _run)(quantise, flat[record.path])
    return dataclasses.replace(model, params=trees.update(model.params, leaves))


def _run(function, *leaves):
    return jax.jit(function)(*leaves)
