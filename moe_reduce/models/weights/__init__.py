"""Weights, and the products that read them: the one place that knows how a weight is stored.

A value is an array or a `Quantised` in one of the schemes of core/schemes.py:

    weight.py     a value with its adapter delta, and every product of a model
    dots.py       rows times one matrix
    quantised.py  the pytree of a quantised matrix
    codes.py      code points, and their packing into bytes
    scales.py     scales and zero points

A new scheme is a code in codes.py and core/schemes.py.
"""

from moe_reduce.models.weights.dots import multiply
from moe_reduce.models.weights.quantised import Quantised, assemble, quantise
from moe_reduce.models.weights.scales import LARGEST_INT8
from moe_reduce.models.weights.weight import (
    INPUTS,
    Product,
    Value,
    Weight,
    cast,
    dequantised,
    grouped_matmul,
    is_quantised,
    linear,
    logits,
    lookup,
    map_parts,
    matmul,
    read,
    weight,
)

__all__ = [
    "INPUTS", "LARGEST_INT8", "Product", "Quantised", "Value", "Weight", "assemble", "cast", "dequantised",
    "grouped_matmul", "is_quantised", "linear", "logits", "lookup", "map_parts", "matmul", "multiply", "quantise",
    "read", "weight",
]  # fmt: skip
