"""Validation of an adapter's config against its base model."""

import math

from moe_reduce.adapters import projections
from moe_reduce.adapters.leaves import rank, sketch_width
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core.checks import in_range
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError


def check(config: AdapterConfig, model: ModelConfig) -> None:
    """Raise UserError for a config that is impossible for this model, whether the adapter is new or loaded."""
    _check_method(config)
    _check_numbers(config)
    targets = targets_of(config, model)
    if config.method == "dora" and any(target.experts for target in targets):
        raise UserError("dora supports single matrices only, and these targets are experts: choose lora or skema")
    if config.dropout and any(target.experts for target in targets):
        raise UserError("adapter.dropout supports single matrices only, and these targets are experts: set it to 0")
    if config.method != "skema":
        rank(config)
        return
    for target in targets:
        for size in (target.in_features, target.out_features):
            projections.check(config.projection, sketch_width(config), size, target.path)


def check_new(config: AdapterConfig, model: ModelConfig) -> None:
    """Raise UserError for a config that a new adapter of this model cannot have.

    The rank may not exceed the size of a matrix. Loaded PEFT adapters may have such a rank: it only wastes parameters.
    """
    check(config, model)
    for target in targets_of(config, model):
        smallest = min(target.in_features, target.out_features)
        if config.rank is not None and config.rank > smallest:
            raise UserError(f"adapter.rank ({config.rank}) exceeds {smallest}, a size of {target.path}: lower it")


def check_split(config: AdapterConfig, model: ModelConfig, tensor: int) -> None:
    """Raise UserError for an adapter that cannot run with experts split over `tensor` devices."""
    if tensor > 1 and config.projection == "srht" and any(target.experts for target in targets_of(config, model)):
        raise UserError("adapter.projection=srht mixes the whole width of an expert, which mesh.tensor > 1 splits")


def _check_method(config: AdapterConfig) -> None:
    skema = config.method == "skema"
    for name, wanted in (("rank", not skema), ("sketch_width", skema)):
        if getattr(config, name) is not None and not wanted:
            raise UserError(f"adapter.{name} is not for {config.method}: leave it None")
    if skema and (config.core == "low_rank") != (config.core_rank is not None):
        raise UserError(f"adapter.core={config.core} and adapter.core_rank={config.core_rank}: low_rank needs a rank")
    if config.trainable_sketch and (not skema or config.projection == "srht"):
        raise UserError("adapter.trainable_sketch is for skema with orthonormal or gaussian projections")


def _check_numbers(config: AdapterConfig) -> None:
    for name, least in (("core_std", 0), ("seed", 0), ("core_rank", 1)):
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"adapter.{name} must be at least {least}, got {value}")
    in_range("adapter", config, "dropout", 0.0, 1.0)
    if config.alpha is not None and not 0 < config.alpha < math.inf:
        raise UserError(f"adapter.alpha must be positive, got {config.alpha}")
