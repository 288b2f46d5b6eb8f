"""A weight, its adapter delta, and the products that read it: every product of a model is computed here.

`weight(module, name)` returns a module's value with its adapter delta. `matmul` multiplies all rows by one weight,
`grouped_matmul` each row by its expert's weight; `logits` and `lookup` read a token table. Operand layout, dequantising
and deltas are handled here and hidden from callers.
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
from moe_reduce.models.collect import sow
from moe_reduce.models.deltas import Delta
from moe_reduce.models.parameters import Parameter, find_in_module, record_in_module
from moe_reduce.models.rounded import Rounded
from moe_reduce.models.weights.dots import multiply
from moe_reduce.models.weights.quantised import Function, Quantised

INPUTS = "inputs"  # collection of the inputs of `linear`, by the name of the matrix, where a caller asks for it
Product = Callable[[jax.Array, jax.Array], jax.Array]  # (rows, a matrix for each expert or for each group) -> rows
Value = jax.Array | Quantised


def map_parts(function: Function, record: Parameter, value: Any) -> Any:
    """A value with each array replaced by function(axes, array); axes: the axes of the parameter that the array has.

    The axis of an array that follows none of the parameter's has None in its place.
    """
    if isinstance(value, Quantised):
        return value.map(function, record)
    return function(tuple(range(len(record.axes))), value)


def is_quantised(value: Any) -> bool:
    """True for a quantised value. Such values are always frozen."""
    return isinstance(value, Quantised)


def cast(value: Any, dtype: Any) -> Any:
    """An array cast to a dtype; a quantised value unchanged."""
    return value if is_quantised(value) else jnp.asarray(value, dtype)


def dequantised(value: Any, dtype: Any) -> jax.Array:
    """A value as an array of a dtype."""
    return value.dequantised(dtype) if isinstance(value, Quantised) else value.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A value to multiply by, and its adapter delta.

    input_axes: number of leading axes of one matrix that a product contracts. layout: layout of a product's operands
    (ExecutionConfig.products). fp32_products: in true fp32 whatever the compute dtype, as routers need them.
    """

    value: Any
    delta: Delta | None = None
    input_axes: int = dataclasses.field(default=1, metadata={"static": True})
    layout: str = dataclasses.field(default="plain", metadata={"static": True})
    fp32_products: bool = dataclasses.field(default=False, metadata={"static": True})


def read(module: Any, name: str) -> Any:
    """Parameter `name` of the module, rounded if it trains so; during init, created by its record's initialiser."""
    known = module.get_variable("params", name) if module.has_variable("params", name) else None
    if known is not None and not isinstance(known, Rounded):
        return known
    record = record_in_module(module.config, module.path, name)
    if known is not None:
        return known.values(record)
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
    sow(module, INPUTS, {name: x})
    y = matmul(x, weight(module, name))
    if find_in_module(module.config, module.path, f"{name}_bias") is None:
        return y
    bias = read(module, f"{name}_bias")
    # added in fp32, so that the gradient of the bias, a sum over all tokens, is formed in fp32 too
    return (y.astype(jnp.float32) + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)).astype(y.dtype)


def matmul(x: jax.Array, w: Weight, transposed: bool = False) -> jax.Array:
    """x [..., *in] · w [*in, *out] -> [..., *out] in the dtype of x, or in fp32 where `fp32_products` says so.

    transposed: x [..., *out] · wᵀ -> [..., *in]. Transposed products take no adapter. Leading axes are flattened first:
    otherwise XLA on CPU runs the gradient at a third of the speed.
    """
    assert w.delta is None or not transposed, "transposed products are for embeddings, which take no adapter"
    ins, outs = w.value.shape[: w.input_axes], w.value.shape[w.input_axes :]
    contracted, kept = (outs, ins) if transposed else (ins, outs)
    lead = x.shape[: x.ndim - len(contracted)]
    x_SI = x.reshape(math.prod(lead), math.prod(contracted))
    matrix = _flat(w.value, w.input_axes)
    if w.fp32_products:
        y_SO = _fp32_product(x_SI, dequantised(matrix, jnp.float32), w.layout)
    else:
        y_SO = checkpoint_name(_product(x_SI, matrix, w.layout, transposed), products.REMAT_SAVED)
    if w.delta is not None:
        dot: Any = _fp32_product if w.fp32_products else products.product
        base = partial(_as_array, matrix)
        y_SO = deltas.adapted(x_SI, y_SO, base, w.delta, lambda x, m: dot(x, m, w.layout))
    return y_SO.reshape(*lead, *kept)


def grouped_matmul(rows: jax.Array, w: Weight, product: Product) -> jax.Array:
    """Each row times its expert's matrix, plus the expert's delta, [..., O] in the dtype of the rows.

    w.value: [E, I, O]. product(rows, matrices [E or J, I, O]): the dispatch's product by expert or, for a bank of
    adapters, by group (models/moe/dispatch.py).
    """
    y = product(rows, dequantised(w.value, rows.dtype))
    if w.delta is None:
        return y

    def dot(x: jax.Array, matrix: jax.Array) -> jax.Array:
        if matrix.ndim == 3:
            return product(x, matrix)
        # one matrix for all experts, such as a fixed projection
        return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    return y + deltas.added(rows, deltas.of_groups(w.delta, w.value.shape[0]), w.value.shape[2], dot)


def logits(x: jax.Array, table: Weight) -> jax.Array:
    """x [B, T, D] · table [V, D]ᵀ -> fp32 [B, T, V]."""
    x_SD = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    found: Any
    if isinstance(table.value, Quantised):
        found = multiply(x_SD, table.value, table.layout)
    else:
        found = products.logits(x_SD, table.value, table.layout)
    return found.reshape(x.shape[0], x.shape[1], -1)


def lookup(tokens: jax.Array, table: Weight, dtype: Any) -> jax.Array:
    """Rows of table [V, D] in a dtype. They are cast after they are gathered, so that their gradients sum in fp32."""
    value = table.value
    return value.rows(tokens, dtype) if isinstance(value, Quantised) else value[tokens].astype(dtype)


def _flat(value: Any, input_axes: int) -> Any:
    """A value [*in, *out] as one matrix [I, O]."""
    if isinstance(value, Quantised):
        return value.flat()
    return value.reshape(math.prod(value.shape[:input_axes]), -1)


def _as_array(matrix: Any) -> jax.Array:
    return matrix.dequantised() if isinstance(matrix, Quantised) else matrix


def _product(x: jax.Array, matrix: Any, layout: str, transposed: bool) -> Any:
    if isinstance(matrix, Quantised):
        return multiply(x, matrix, layout, transposed).astype(x.dtype)
    return products.product(x, matrix.T if transposed else matrix, layout)


def _fp32_product(x_SI: jax.Array, matrix_IO: jax.Array, layout: str) -> jax.Array:
    """Product in true fp32, not in default bf16 or TF32 passes, whose rounding would change the chosen experts.

    For bf16 inputs three bf16 passes are as accurate (models/products.py), and faster than fp32 except on CPU.
    """
    if x_SI.dtype == jnp.bfloat16 and layout == "plain":
        return products.fp32_product(x_SI, matrix_IO)
    return jnp.matmul(x_SI.astype(jnp.float32), matrix_IO, precision=jax.lax.Precision.HIGHEST)
