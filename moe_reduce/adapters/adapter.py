"""Adapter as a tree of leaves beside the base's parameters: initial values, trained leaves, activation.

An active adapter is stored in params["adapter"]. The leaves of a target have the path of the base's parameter as prefix
and are stacked over the layers in `layer_numbers`; models/deltas.py describes them. Example: LoRA on the queries of
layers 1 and 3:

    adapter/layers/attention/query/in/matrix    [2, I, K]
                                  /out/matrix   [2, K, O]
                                  /scale        [2]
                                  /layer_numbers  [1, 3]
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from moe_reduce.adapters.checks import check, check_new
from moe_reduce.adapters.leaves import leaves_of, trained_names
from moe_reduce.adapters.replacements import Replacements, applied
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER, BANK
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import abstract_params


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's config and leaves, real or abstract."""

    config: AdapterConfig
    tree: dict[str, Any]  # the content of params["adapter"]
    replaced: Replacements = field(default_factory=dict)  # parameters of the base that it has its own values of


def init(config: AdapterConfig, model: Model) -> Adapter:
    """A new adapter with ΔW = 0, or nearly 0 with a low-rank core; abstract if the model's parameters are.

    Raises UserError if the config does not fit the model.
    """
    check_new(config, model.config)
    return Adapter(config, _init(config, model))


def abstract(config: AdapterConfig, model: ModelConfig) -> dict[str, Any]:
    """Abstract leaves of a new adapter: `init` on abstract parameters."""
    return init(config, _abstract_model(model)).tree


def trained(config: AdapterConfig, path: str) -> bool:
    """True if the adapter's leaf at this path trains."""
    return any(path.endswith(f"/{name}") for name in trained_names(config))


def count(adapter: Adapter) -> int:
    """Number of trained parameters."""
    flat = trees.flatten(adapter.tree)
    trained_leaves = sum(math.prod(leaf.shape) for path, leaf in flat.items() if trained(adapter.config, path))
    return trained_leaves + sum(value.size for value in adapter.replaced.values())


def trained_parameters(config: AdapterConfig, model: ModelConfig) -> int:
    """Number of parameters that a new adapter would train, without checking that the config fits the model."""
    return count(Adapter(config, _init(config, _abstract_model(model))))


def activate(model: Model, adapter: Adapter) -> Model:
    """The model with the adapter active beside its parameters; `merging.merge` returns a plain model again."""
    if ADAPTER in model.params or BANK in model.params:
        raise UserError("this model already has an active adapter: merge or unmerge it first")
    check_fits(adapter, model.config)
    return dataclasses.replace(model, params=applied(model.params, adapter.replaced) | {ADAPTER: adapter.tree})


def check_fits(adapter: Adapter, model: ModelConfig) -> None:
    """Raise UserError for the first leaf that is missing, has no place in the model, or has the wrong shape."""
    check(adapter.config, model)
    wanted = trees.flatten(_init(adapter.config, _abstract_model(model)))
    found = trees.flatten(adapter.tree)
    for path in sorted(set(wanted) ^ set(found)):
        state = "is missing from the adapter" if path in wanted else "has no place in this model"
        raise UserError(f"adapter leaf {path} {state}: give the adapter of this base")
    for path, leaf in found.items():
        if tuple(leaf.shape) != wanted[path].shape:
            raise UserError(f"adapter leaf {path} has shape {tuple(leaf.shape)}, this base needs {wanted[path].shape}")


def _init(config: AdapterConfig, model: Model) -> dict[str, Any]:
    weights = trees.flatten(model.params)
    return trees.unflatten(
        {
            f"{target.path}/{name}": leaf.init(target, weights[target.path])
            for target in targets_of(config, model.config)
            for name, leaf in leaves_of(config, target).items()
        }
    )


def _abstract_model(model: ModelConfig) -> Model:
    return Model(model, abstract_params(model), ExecutionConfig())
