"""Our layout of quantised matrices: the codes under the name of the weight, scales and zero points beside them."""

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moe_reduce.core import schemes
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import SECOND_GROUP, Scheme
from moe_reduce.families import QUANTISATION, QUANTISATION_METHOD, ParameterLayout
from moe_reduce.storage.tensors import Tensors
from moe_reduce.storage.weight_parts import Part

METHOD = "moe_reduce"  # name of the layout in config.json
SCHEMES = "schemes"  # key of the schemes by path of the parameter
INT8 = schemes.parse("int8")
FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
INTEGERS, BYTES = np.dtype(np.int8), np.dtype(np.uint8)
CODES = {"int8": INTEGERS, "fp8": FP8}  # dtype of packed codes; those of other schemes are bytes
SCALES = {"mxfp4": BYTES, "nf4": INTEGERS}  # dtype of scales; those of other schemes are floating-point


def parts(leaf: ParameterLayout, scheme: Scheme) -> list[Part]:
    """The arrays of a matrix.

    NAME, of codes, is [outputs, bytes]; NAME_scale is [outputs, groups], or [outputs] if each output has one. MXFP4 is
    laid out as in gpt-oss: NAME_blocks [outputs, groups, 16] and NAME_scales [outputs, groups]. NF4 has the steps and
    the mean of its scales beside these.
    """
    inputs, outputs = leaf.record.matrix_shape
    groups, shared = scheme.scales(inputs, outputs)
    micro = scheme.code == "mxfp4"
    codes = leaf.part("_blocks" if micro else "", scheme.packed(inputs))
    blocks = (*codes.stored_shape[:-1], groups, codes.stored_shape[-1] // groups) if micro else None
    blocks = blocks if codes.stored_axes[-1] == "I" else None
    found = [Part("codes", codes, (CODES.get(scheme.code, BYTES),), blocks)]
    outer = shared if scheme.shares_outputs else None
    scales = leaf.part("_scales" if micro else "_scale", groups, outer)
    shape = None
    if scheme.scope in ("channel", "tensor"):
        shape = tuple(size for axis, size in zip(scales.stored_axes, scales.stored_shape, strict=True) if axis != "I")
    found.append(Part("scales", scales, _scale_dtypes(scheme), shape))
    if scheme.affine:
        found.append(Part("zeros", leaf.part("_zero_point", groups, outer), (INTEGERS,), shape))
    if scheme.code == "nf4":
        count = math.ceil(groups * outputs / SECOND_GROUP)
        found += [
            Part("steps", leaf.part("_scale_step", count, 0), (FLOAT32,)),
            Part("mean", leaf.part("_scale_mean", 0, 0), (FLOAT32,)),
        ]
    return found


def _scale_dtypes(scheme: Scheme) -> tuple[np.dtype, ...]:
    """Dtypes that scales may have: those of integers that another program rounded stay as that program stored them."""
    if scheme.code in SCALES:
        return (SCALES[scheme.code],)
    return (BFLOAT16, FLOAT16, FLOAT32) if scheme.scope == "group" else (FLOAT32, BFLOAT16)


def described(by_path: Mapping[str, Scheme]) -> dict[str, Any] | None:
    """`quantization_config` of a model, from the schemes of its quantised parameters.

    None where all are int8, as in models written by earlier versions.
    """
    if set(by_path.values()) <= {INT8}:
        return None
    return {QUANTISATION_METHOD: METHOD, SCHEMES: {path: str(scheme) for path, scheme in sorted(by_path.items())}}


def parts_like(stored: ParameterLayout, leaf: ParameterLayout, scheme: Scheme, files: Tensors) -> list[Part]:
    """The arrays of a matrix `leaf` in the layout in which these files hold `stored`."""
    del stored, files
    return parts(leaf, scheme)


def scheme_of(leaf: ParameterLayout, files: Tensors) -> Scheme | None:
    """The scheme of a weight; None for an array."""
    if not files.quantisation:
        scaled = leaf.record.is_matrix and f"{leaf.name((0,) * len(leaf.stacked))}_scale" in files.entries
        return INT8 if scaled else None
    named = files.quantisation.get(SCHEMES)
    if not isinstance(named, Mapping):
        raise UserError(f"{QUANTISATION} in {files.directory} has no {SCHEMES}: quantise the model again")
    return schemes.parse(str(named[leaf.path])) if leaf.path in named else None
