"""Values that modules hand out to callers that ask for them (`collect` of Model.apply)."""

from typing import Any

import flax.linen as nn
import jax


def sow(module: nn.Module, collection: str, values: dict[str, jax.Array]) -> None:
    """Sow values by name: each is stored as it is, without the tuple in which linen collects repeated calls."""
    last: Any = {"reduce_fn": lambda _, new: new, "init_fn": dict}
    for name, value in values.items():
        module.sow(collection, name, value, **last)
