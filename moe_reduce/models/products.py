"""Matrix products with operands in the compute dtype and fp32 accumulation, forward and backward.

JAX's own gradient of a bf16 product multiplies fp32 by bf16, and rounds the gradient of the matrix to bf16. Here
cotangents are in the compute dtype, and the gradient of a matrix has the dtype in which the matrix is stored.

The layout "transposed" (ExecutionConfig.products) is for bf16 on CPUs. There XLA uses the matrix units only if the
contracted axis of the left operand is last in memory, and it rejects some bf16 products with fp32 sums in any other
layout. So the left operand is first transposed in memory, and the layout of every operand is fixed (measured: 1,100
instead of 250 GFLOP/s). On other platforms this would only add a copy.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

# checkpoint_name of the values that remat=dots saves: results of products, and rows received from other devices
REMAT_SAVED = "product"


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype in which values of a dtype are summed: fp64 for fp64, else fp32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, layout: str, batch: int = 0) -> jax.Array:
    """Contract left_axis with right_axis, which are both counted from the first axis after the `batch` batch axes.

    Sums and result are in `accumulation_dtype`.
    """
    sums = accumulation_dtype(left.dtype)
    axes = tuple(range(batch))
    numbers = (((batch + left_axis,), (batch + right_axis,)), (axes, axes))
    if layout != "transposed":
        return jax.lax.dot_general(left, right, numbers, preferred_element_type=sums)
    if left_axis == 0:
        left, numbers = jnp.swapaxes(left, -1, -2), (((batch + 1,), (batch + right_axis,)), (axes, axes))
    return row_major(jax.lax.dot_general(row_major(left), row_major(right), numbers, preferred_element_type=sums))


def row_major(x: jax.Array) -> jax.Array:
    """x, stored in memory in row-major order.

    XLA then cannot swap the operands of a product, fold a transposition away or recompute x at each use. If the mesh in
    context has an axis that is not manual, x is returned unchanged, since XLA would gather it on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    if any(size > 1 and kind != AxisType.Manual for size, kind in axes):
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_SI: jax.Array, matrix_IO: jax.Array, layout: str = "plain") -> jax.Array:
    """x · matrix, [S, O] in the dtype of x, to which the matrix is cast; its gradient has the matrix's own dtype.

    If x and matrix have equal leading axes, the product is batched over them.
    """
    return dot(x_SI, matrix_IO.astype(x_SI.dtype), 1, 0, layout, x_SI.ndim - 2).astype(x_SI.dtype)


def _product_forward(x_SI, matrix_IO, layout):
    return product(x_SI, matrix_IO, layout), (x_SI, matrix_IO)


def _product_backward(layout, saved, dy_SO):
    x_SI, matrix_IO = saved
    batch = x_SI.ndim - 2
    dx_SI = dot(dy_SO, matrix_IO.astype(dy_SO.dtype), 1, 1, layout, batch).astype(x_SI.dtype)
    return dx_SI, dot(x_SI, dy_SO, 0, 0, layout, batch).astype(matrix_IO.dtype)


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def logits(x_SD: jax.Array, table_VD: jax.Array, layout: str = "plain") -> jax.Array:
    """x · tableᵀ, [S, V] in fp32."""
    return dot(x_SD, table_VD.astype(x_SD.dtype), 1, 1, layout)


def _logits_forward(x_SD, table_VD, layout):
    return logits(x_SD, table_VD, layout), (x_SD, table_VD)


def _logits_backward(layout, saved, dlogits_SV):
    x_SD, table_VD = saved
    dlogits_SV = dlogits_SV.astype(x_SD.dtype)
    dx_SD = dot(dlogits_SV, table_VD.astype(x_SD.dtype), 1, 0, layout).astype(x_SD.dtype)
    return dx_SD, dot(dlogits_SV, x_SD, 0, 0, layout).astype(table_VD.dtype)


logits.defvjp(_logits_forward, _logits_backward)


@jax.custom_vjp
def fp32_product(x_SI: jax.Array, matrix_IO: jax.Array) -> jax.Array:
    """bf16 x · fp32 matrix, [S, O] in fp32: as accurate as an fp32 product, but by three bf16 passes of matrix units.

    An fp32 number is the sum of three bf16 numbers, and the product of two bf16 numbers is exact in fp32. The three
    passes are one product of concatenated operands, so partial sums are not written to memory. Leading axes and the
    gradient are as in `product`.
    """
    parts, rest = [], matrix_IO.astype(jnp.float32)
    for _ in range(3):
        # XLA may remove a cast to bf16 and back, but not reduce_precision
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    smallest_first = jnp.concatenate(parts[::-1], axis=-2)
    return dot(jnp.concatenate([x_SI] * 3, axis=-1), smallest_first, 1, 0, "plain", x_SI.ndim - 2)


def _fp32_forward(x_SI, matrix_IO):
    return fp32_product(x_SI, matrix_IO), (x_SI, matrix_IO)


def _fp32_backward(saved, dy_SO):
    return _product_backward("plain", saved, dy_SO.astype(jnp.bfloat16))


fp32_product.defvjp(_fp32_forward, _fp32_backward)
