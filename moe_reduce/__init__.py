"""Make a language model smaller, and show what it cost.

model = moe_reduce.load(path)      # a model directory of ours or of Hugging Face
logits_BTV = model(tokens_BT)
moe_reduce.save(model, path)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_reduce.models.model import Model
    from moe_reduce.storage.model_directory import load, save

__all__ = ["Model", "load", "save"]
_HOMES = {"Model": "models.model", "load": "storage.model_directory", "save": "storage.model_directory"}


def __getattr__(name: str) -> Any:
    """Import on first use: data workers import this package and must not start JAX."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"moe_reduce.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
