"""Matrices that train while products read them rounded (quantisation-aware training)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from moe_reduce.models.parameters import Parameter

Rounding = Callable[[jax.Array, Parameter], jax.Array]  # (values, with or without the axis of layers, record)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """A parameter in full precision, and the rounding of the values that products read.

    Roundings are hashable and compare by value, because they are constants of a compiled program.
    """

    master: Any
    rounding: Rounding = dataclasses.field(metadata={"static": True})

    def values(self, record: Parameter) -> jax.Array:
        """Rounded values; their gradient passes to the master unchanged (arXiv:1308.3432)."""
        return straight_through(self.master, self.rounding(self.master, record))


@jax.custom_vjp
def straight_through(master: jax.Array, rounded: jax.Array) -> jax.Array:
    """Return `rounded`, bit for bit, with the gradient of `master`."""
    del master
    return rounded


def _straight_through_forward(master, rounded):
    del master
    return rounded, None


def _straight_through_backward(_, cotangent):
    return cotangent, None


straight_through.defvjp(_straight_through_forward, _straight_through_backward)
