"""Experts for tests of dispatch and exchange."""

import jax

from moe_reduce.models.moe.experts import Experts, Masters, cast_experts
from moe_reduce.models.weights import Weight

Matrices = tuple[jax.Array, jax.Array, jax.Array]


def experts_of(
    matrices: Matrices, dtype="float32", trained: bool = True, deltas=None, layout: str = "plain"
) -> tuple[Experts, Masters]:
    """(experts of gate, up and down matrices computed in a dtype, their masters)."""
    deltas = deltas or {}
    names = ("gate", "up", "down")
    weights = (Weight(x, deltas.get(name), layout=layout) for name, x in zip(names, matrices, strict=True))
    return cast_experts(Experts(*weights), dtype, trained)
