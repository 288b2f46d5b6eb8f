"""Sliding windows in a config.json: `sliding_window`, and `layer_types` where layers differ."""

from collections.abc import Sequence
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.model_config import FULL, WINDOWED

TYPES = {"sliding_attention": WINDOWED, "full_attention": FULL}


def read(window: Any, types: Any, layers: int) -> dict[str, Any]:
    """Fields of ModelConfig for a window and the types of the layers. UserError for another type of layer."""
    if not isinstance(types, Sequence) or not all(isinstance(one, str) and one in TYPES for one in types):
        raise UserError(f"layer_types={types!r} is not supported, only a list of {' and '.join(map(repr, TYPES))}")
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries and num_hidden_layers is {layers}: correct one of them")
    pattern = "".join(TYPES[one] for one in types)
    if WINDOWED not in pattern:
        return {"sliding_window": None, "window_pattern": None}
    if type(window) is not int:
        raise UserError(f"sliding_window must be int, got {window!r}: layer_types has layers with a window")
    return {"sliding_window": window, "window_pattern": pattern if FULL in pattern else None}


def types_of(config: ModelConfig) -> list[str]:
    """`layer_types` of a config."""
    names = {letter: name for name, letter in TYPES.items()}
    return [names[FULL if config.window(layer) is None else WINDOWED] for layer in range(config.layers)]
