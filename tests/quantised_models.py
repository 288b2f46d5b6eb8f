"""Quantised models for tests."""

from collections.abc import Collection

from moe_reduce.core import schemes
from moe_reduce.models.model import Model
from moe_reduce.quantization.round_to_nearest import KEPT, every_component, quantise


def quantise_int8(model: Model, keep: Collection[str] = KEPT) -> Model:
    """The model with its matrices as int8, one scale for each output; keep: components that stay as they are."""
    return quantise(model, every_component(model.config, schemes.parse("int8"), keep))
