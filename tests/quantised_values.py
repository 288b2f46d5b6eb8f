"""Quantised matrices from given codes and scales."""

import jax
import jax.numpy as jnp

from moe_reduce.core.schemes import parse
from moe_reduce.models.weights import Quantised

INT8 = parse("int8")


def int8(codes: jax.Array, scales: jax.Array, outputs_first: bool = False) -> Quantised:
    """Int8 codes [..., I, O], or [..., O, I] with outputs first, with a scale for each output [..., O]."""
    axis = -1 if outputs_first else -2
    return Quantised(codes, jnp.expand_dims(scales, axis), None, INT8, (codes.shape[axis],), 1, outputs_first)
