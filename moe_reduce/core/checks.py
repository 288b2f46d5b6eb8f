"""Range checks that the configuration dataclasses share. Every refusal is one line that names the key."""

import math
from typing import Any

from moe_reduce.core.errors import UserError


def positive(section: str, config: Any, *names: str) -> None:
    """Raise UserError at the first named attribute that is not above zero and finite.

    section: the path of `config` in the configuration, for the message; empty at the top.
    """
    for name in names:
        if not 0 < getattr(config, name) < math.inf:  # NaN fails every comparison and is refused as well
            key = f"{section}.{name}" if section else name
            raise UserError(f"{key} must be positive, got {getattr(config, name)}")


def in_range(section: str, config: Any, name: str, low: float, high: float) -> None:
    """Raise UserError unless low <= attribute < high."""
    if not low <= getattr(config, name) < high:
        raise UserError(f"{section}.{name} must be at least {low} and below {high}, got {getattr(config, name)}")
