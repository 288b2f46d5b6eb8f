"""The largest adapter within a budget of trained parameters."""

import bisect
import dataclasses

from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import trained_parameters
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError


def within_budget(config: AdapterConfig, model: ModelConfig, allowed: int) -> AdapterConfig:
    """The config with the largest rank or sketch width that trains at most `allowed` parameters.

    Raises UserError if even a size of 1 trains more.
    """
    targets = targets_of(config, model)
    name = "sketch_width" if config.method == "skema" else "rank"
    narrowest = min(min(target.in_features, target.out_features) for target in targets)
    largest = projections.largest(config.projection, narrowest) if config.method == "skema" else narrowest

    def cost(size: int) -> int:
        return trained_parameters(dataclasses.replace(config, **{name: size}), model)

    if cost(1) > allowed:
        raise UserError(f"budget: {allowed:,} parameters are too few for {name}=1, which needs {cost(1):,}")
    sizes = range(1, int(min(largest, allowed)) + 1)  # each size trains at least one parameter
    size = bisect.bisect_right(sizes, allowed, key=cost)
    return dataclasses.replace(config, **{name: size})
