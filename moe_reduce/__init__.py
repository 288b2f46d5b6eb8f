"""Make a language model smaller, and show what it cost.

model = moe_reduce.load(path)      # a model directory of ours or of Hugging Face
logits_BTV = model(tokens_BT)
moe_reduce.save(model, path)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_reduce.storage.model import Model, load, save

__all__ = ["Model", "load", "save"]


def __getattr__(name: str) -> Any:
    """Imports on first use: the data workers import this package and must not start JAX."""
    if name in __all__:
        return getattr(importlib.import_module("moe_reduce.storage.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
