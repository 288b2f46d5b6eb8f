"""Weights, and the products that read them: the one place that knows how a weight is stored.

A value is an array or a quantised type such as `Int8`. `weight(module, name)` returns a module's value with its adapter
delta. `matmul` multiplies all rows by one weight, `grouped_matmul` each row by its expert's weight; `logits` and
`lookup` read a token table. Operand layout, dequantising and deltas are handled here and hidden from callers.

A new quantised type is a class like `Int8`: a pytree whose leaves have the stacked leading axes of the parameter.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_reduce.models import deltas, products
from moe_reduce.models.deltas import Delta
from moe_reduce.models.parameters import Parameter, find_in_module, record_in_module

LARGEST_INT8 = 127  # symmetric range, -127 to 127
Product = Callable[[jax.Array, jax.Array], jax.Array]  # (rows, a matrix for each expert or for each group) -> rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix as int8 with one fp32 scale for each output: w = whole · scale, symmetric, rounded to nearest.

    whole: int8, with the axes of the parameter. scale: fp32, with the same axes but those that a product contracts.
    """

    whole: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.whole.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return self.whole.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the stored values."""
        return self.whole.dtype

    @classmethod
    def quantise(cls, matrix: jax.Array, record: Parameter) -> "Int8":
        """Round a parameter; the largest magnitude of each output becomes 127. All-zero outputs get scale 0."""
        matrix = matrix.astype(jnp.float32)
        scale = jnp.max(jnp.abs(matrix), axis=record.contracted, keepdims=True) / LARGEST_INT8
        spread = jnp.broadcast_to(jnp.where(scale > 0, scale, 1.0), matrix.shape)
        return cls(jnp.round(matrix / spread).astype(jnp.int8), jnp.squeeze(scale, axis=record.contracted))

    def dequantised(self, contracted: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """The dequantised matrix. contracted: axes that `scale` lacks."""
        scale = jnp.broadcast_to(jnp.expand_dims(self.scale, contracted), self.whole.shape)
        return (self.whole.astype(jnp.float32) * scale).astype(dtype)

    def map(self, function: Callable[[tuple[int, ...], Any], Any], record: Parameter) -> "Int8":
        """The matrix with both arrays replaced by function(axes, array); see `map_parts`."""
        every = tuple(range(len(record.axes)))
        kept = tuple(axis for axis in every if axis not in record.contracted)
        return Int8(function(every, self.whole), function(kept, self.scale))


Value = jax.Array | Int8


def map_parts(function: Callable[[tuple[int, ...], Any], Any], record: Parameter, value: Any) -> Any:
    """A value with each array replaced by function(axes, array), where `axes` are the parameter's axes that it has."""
    return value.map(function, record) if isinstance(value, Int8) else function(tuple(range(len(record.axes))), value)


def is_quantised(value: Any) -> bool:
    """True for a value of a quantised type. Such values are always frozen."""
    return isinstance(value, Int8)


def cast(value: Any, dtype: Any) -> Any:
    """An array cast to a dtype; a quantised value unchanged."""
    return value if is_quantised(value) else jnp.asarray(value, dtype)


def dequantised(value: Any, contracted: tuple[int, ...], dtype: Any) -> jax.Array:
    """A value as an array of a dtype."""
    return value.dequantised(contracted, dtype) if isinstance(value, Int8) else value.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A value to multiply by, and its adapter delta.

    input_axes: number of leading axes of one matrix that a product contracts. layout: layout of a product's operands
    (ExecutionConfig.products). exact: products are in true fp32 whatever the compute dtype, as routers need them.
    """

    value: Any
    delta: Delta | None = None
    input_axes: int = dataclasses.field(default=1, metadata={"static": True})
    layout: str = dataclasses.field(default="plain", metadata={"static": True})
    exact: bool = dataclasses.field(default=False, metadata={"static": True})


def read(module: Any, name: str) -> Any:
    """Parameter `name` of the module; during init, created by its record's initialiser."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    record = record_in_module(module.config, module.path, name)
    return module.param(name, record.init, record.layer_shape)


def weight(module: Any, name: str) -> Weight:
    """Matrix `name` of the module, with its adapter delta if there is one."""
    record = record_in_module(module.config, module.path, name)
    return Weight(
        read(module, name), deltas.delta_of(module, name), len(record.inputs), module.execution.products,
        record.precision == "float32_stored",
    )  # fmt: skip


def linear(module: Any, name: str, x: jax.Array) -> jax.Array:
    """x · matrix `name` of the module, plus its bias if there is one, [..., *out] in the dtype of x."""
    y = matmul(x, weight(module, name))
    if find_in_module(module.config, module.path, f"{name}_bias") is None:
        return y
    bias = read(module, f"{name}_bias")
    # added in fp32, so that the gradient of the bias, a sum over all tokens, is formed in fp32 too
    return (y.astype(jnp.float32) + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)).astype(y.dtype)


def matmul(x: jax.Array, w: Weight, transposed: bool = False) -> jax.Array:
    """x [..., *in] · w [*in, *out] -> [..., *out] in the dtype of x, or in fp32 where the weight is exact.

    transposed: x [..., *out] · wᵀ -> [..., *in]. Transposed products take no adapter. Leading axes are flattened first:
    otherwise XLA on CPU runs the gradient at a third of the speed.
    """
    assert w.delta is None or not transposed, "an adapter changes no embedding"
    ins, outs = w.value.shape[: w.input_axes], w.value.shape[w.input_axes :]
    contracted, kept = (outs, ins) if transposed else (ins, outs)
    lead = x.shape[: x.ndim - len(contracted)]
    x_SI = x.reshape(math.prod(lead), math.prod(contracted))
    matrix = _flat(w.value, w.input_axes)
    if w.exact:
        y_SO = _exact(x_SI, dequantised(matrix, (0,), jnp.float32), w.layout)
    else:
        y_SO = checkpoint_name(_product(x_SI, matrix, w.layout, transposed), products.REMAT_SAVED)
    if w.delta is not None:
        multiply: Any = _exact if w.exact else products.product
        y_SO = deltas.adapted(x_SI, y_SO, partial(_as_array, matrix), w.delta, lambda x, m: multiply(x, m, w.layout))
    return y_SO.reshape(*lead, *kept)


def grouped_matmul(rows: jax.Array, w: Weight, product: Product) -> jax.Array:
    """Each row times its expert's matrix, plus the expert's delta, [..., O] in the dtype of the rows.

    w.value: [E, I, O]. product(rows, matrices [E or J, I, O]): the dispatch's product by expert or, for a bank of
    adapters, by group (models/moe/dispatch.py).
    """
    y = product(rows, dequantised(w.value, (1,), rows.dtype))
    if w.delta is None:
        return y

    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        if matrix.ndim == 3:
            return product(x, matrix)
        # one matrix for all experts, such as a fixed projection
        return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    return y + deltas.added(rows, deltas.of_groups(w.delta, w.value.shape[0]), w.value.shape[2], multiply)


def multiply(x: jax.Array, matrix: Any, layout: str, transposed: bool = False) -> jax.Array:
    """x [S, I] · one matrix [I, O], or x [S, O] · its transpose; fp32 sums and result.

    The gradient of an array is JAX's own: callers define another.
    """
    if not isinstance(matrix, Int8):
        return products.dot(x, matrix, 1, int(transposed), layout)
    return _int8_dot(x, matrix.whole, matrix.scale, int(transposed), transposed, layout)


def logits(x: jax.Array, table: Weight) -> jax.Array:
    """x [B, T, D] · table [V, D]ᵀ -> fp32 [B, T, V]."""
    x_SD = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    found: Any
    if isinstance(table.value, Int8):
        found = _int8_dot(x_SD, table.value.whole, table.value.scale, 1, False, table.layout)
    else:
        found = products.logits(x_SD, table.value, table.layout)
    return found.reshape(x.shape[0], x.shape[1], -1)


def lookup(tokens: jax.Array, table: Weight, dtype: Any) -> jax.Array:
    """Rows of table [V, D] in a dtype. The cast follows the gather, so that gradients of a row are summed in fp32."""
    value = table.value
    if not isinstance(value, Int8):
        return value[tokens].astype(dtype)
    return Int8(value.whole[tokens], value.scale[tokens]).dequantised((-1,), dtype)


def _flat(value: Any, input_axes: int) -> Any:
    """A value [*in, *out] as one matrix [I, O]."""
    if isinstance(value, Int8):
        return Int8(_flat(value.whole, input_axes), value.scale.reshape(-1))
    return value.reshape(math.prod(value.shape[:input_axes]), -1)


def _as_array(matrix: Any) -> jax.Array:
    return matrix.dequantised((0,)) if isinstance(matrix, Int8) else matrix


def _product(x: jax.Array, matrix: Any, layout: str, transposed: bool) -> Any:
    if isinstance(matrix, Int8):
        return multiply(x, matrix, layout, transposed).astype(x.dtype)
    return products.product(x, matrix.T if transposed else matrix, layout)


def _exact(x_SI: jax.Array, matrix_IO: jax.Array, layout: str) -> jax.Array:
    """Product in true fp32, not in default bf16 or TF32 passes, whose rounding would change the chosen experts.

    For bf16 inputs three bf16 passes are as accurate (models/products.py), and faster than fp32 except on CPU.
    """
    if x_SI.dtype == jnp.bfloat16 and layout == "plain":
        return products.exact(x_SI, matrix_IO)
    return jnp.matmul(x_SI.astype(jnp.float32), matrix_IO, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _int8_dot(x: jax.Array, whole: jax.Array, scale: jax.Array, axis: int, scales_x: bool, layout: str) -> jax.Array:
    """x [S, ·] · whole, contracted over `axis` of whole, fp32. scale multiplies x if `scales_x`, else the result."""
    if scales_x:
        x = _scaled(x, scale)
    y = products.dot(x, whole.astype(x.dtype), 1, axis, layout)
    return y if scales_x else _scaled(y, scale)


def _int8_dot_forward(x, whole, scale, axis, scales_x, layout):
    # x is not saved, since the matrix is frozen and gets no gradient
    return _int8_dot(x, whole, scale, axis, scales_x, layout), (whole, scale, jnp.zeros((), x.dtype))


def _int8_dot_backward(axis, scales_x, layout, saved, dy):
    whole, scale, like = saved
    dy = (dy if scales_x else _scaled(dy, scale)).astype(like.dtype)
    dx = products.dot(dy, whole.astype(like.dtype), 1, 1 - axis, layout)
    return (_scaled(dx, scale) if scales_x else dx).astype(like.dtype), None, None


_int8_dot.defvjp(_int8_dot_forward, _int8_dot_backward)


def _scaled(rows: jax.Array, scale: jax.Array) -> jax.Array:
    return (rows.astype(scale.dtype) * jnp.broadcast_to(scale, rows.shape)).astype(rows.dtype)
