"""Range checks that the configuration dataclasses share. Every refusal is one line that names the key."""

import math
from collections.abc import Mapping
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


def at_most(section: str, config: Any, largest: Mapping[str, int]) -> None:
    """Raise UserError at the first attribute above its largest value; None passes."""
    for name, limit in largest.items():
        value = getattr(config, name)
        if value is not None and value > limit:
            raise UserError(f"{section}.{name} must be at most {limit}, got {value}: correct it")


def in_range(section: str, config: Any, name: str, low: float, high: float) -> None:
    """Raise UserError unless low <= attribute < high."""
    if not low <= getattr(config, name) < high:
        raise UserError(f"{section}.{name} must be at least {low} and below {high}, got {getattr(config, name)}")
