"""Products of rows with one matrix, an array or quantised, with fp32 sums."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.models import products
from moe_reduce.models.weights import few_rows
from moe_reduce.models.weights.quantised import Quantised


def multiply(x: jax.Array, matrix: Any, layout: str, transposed: bool = False) -> jax.Array:
    """x [S, I] · one matrix [I, O], or x [S, O] · its transpose; fp32 sums and result.

    A quantised matrix may have its outputs first. The gradient of an array is JAX's own: callers define another.
    """
    if not isinstance(matrix, Quantised):
        return products.dot(x, matrix, 1, int(transposed), layout)
    return _quantised_dot(x, matrix, transposed, layout)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _quantised_dot(x: jax.Array, matrix: Quantised, transposed: bool, layout: str) -> jax.Array:
    whole = partial(_dot, transposed=transposed, layout=layout, dtype=x.dtype)
    if not few_rows.suits(x.shape[0], matrix, transposed):
        return whole(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=few_rows.multiply, default=whole)


def _forward(x, matrix, transposed, layout):
    # x is not saved, since the matrix is frozen and gets no gradient
    return _quantised_dot(x, matrix, transposed, layout), (matrix, jnp.zeros((), x.dtype))


def _backward(transposed, layout, saved, dy):
    matrix, like = saved
    return _dot(dy, matrix, not transposed, layout, like.dtype).astype(like.dtype), None


_quantised_dot.defvjp(_forward, _backward)


def _dot(x: jax.Array, matrix: Quantised, transposed: bool, layout: str, dtype: Any) -> jax.Array:
    """x · matrix, or x · its transpose, with operands in a dtype and fp32 sums and result."""
    axis = int(transposed != matrix.outputs_first)
    if matrix.scheme.code != "int8" or matrix.scheme.scope != "channel" or matrix.scheme.affine:
        return products.dot(x.astype(dtype), matrix.dequantised(dtype), 1, axis, layout)
    # a scale of each output moves out of the sum, so that the codes are multiplied as they are
    scale = matrix.scales.reshape(-1)
    rows = (_scaled(x, scale) if transposed else x).astype(dtype)
    y = products.dot(rows, matrix.codes.astype(dtype), 1, axis, layout)
    return y if transposed else _scaled(y, scale)


def _scaled(rows: jax.Array, scale: jax.Array) -> jax.Array:
    return (rows.astype(jnp.float32) * jnp.broadcast_to(scale.astype(jnp.float32), rows.shape)).astype(rows.dtype)
