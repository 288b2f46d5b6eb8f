"""Errors that callers of this package catch."""

from moe_reduce.core.errors import UserError

__all__ = ["UserError"]
