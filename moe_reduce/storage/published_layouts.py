"""Layouts of quantised matrices in which models are published by their makers.

fp8     of DeepSeek-V3: NAME float8_e4m3fn [outputs, inputs], and NAME_scale_inv fp32 or bf16 [blocks, blocks], by which
        the codes of a block of 128 outputs by 128 inputs are multiplied
mxfp4   of gpt-oss: NAME_blocks uint8 [experts, outputs, groups, 16] and NAME_scales uint8 [experts, outputs, groups]
        of the experts' matrices, whose inputs come last, unlike those of the matrices that are not quantised
"""

import dataclasses
from typing import Any

from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import BLOCK, Scheme, parse
from moe_reduce.families import QUANTISATION, QUANTISATION_METHOD, ParameterLayout
from moe_reduce.storage import native_layout
from moe_reduce.storage.native_layout import BFLOAT16, FLOAT32, FP8
from moe_reduce.storage.tensors import Tensors
from moe_reduce.storage.weight_parts import Part

FP8_METHOD, MXFP4_METHOD = "fp8", "mxfp4"  # names of the layouts in config.json
METHODS = (FP8_METHOD, MXFP4_METHOD)
SCALES = "_scale_inv"
BLOCKS = "_blocks"
FP8_BLOCKS, MXFP4 = parse("fp8-block"), parse("mxfp4")


def scheme_of(leaf: ParameterLayout, files: Tensors) -> Scheme | None:
    """The scheme of a weight; None for an array. UserError for blocks of another size."""
    name = leaf.name((0,) * len(leaf.stacked))
    if files.quantisation[QUANTISATION_METHOD] == MXFP4_METHOD:
        return MXFP4 if name + BLOCKS in files.entries else None
    if name + SCALES not in files.entries:
        return None
    size: Any = files.quantisation.get("weight_block_size")
    if size != [BLOCK, BLOCK]:
        raise UserError(
            f"{QUANTISATION}.weight_block_size={size!r} in {files.directory} is not supported, only {[BLOCK, BLOCK]}"
        )
    return FP8_BLOCKS


def parts_like(stored: ParameterLayout, leaf: ParameterLayout, scheme: Scheme, files: Tensors) -> list[Part]:
    """The arrays of a matrix `leaf` in the layout in which these files hold `stored`."""
    del stored, files
    if scheme == MXFP4:
        return native_layout.parts(_inputs_last(leaf), scheme)
    groups, shared = scheme.scales(*leaf.record.matrix_shape)
    codes, scales = leaf.part("", leaf.record.matrix_shape[0]), leaf.part(SCALES, groups, shared)
    return [Part("codes", codes, (FP8,)), Part("scales", scales, (FLOAT32, BFLOAT16))]


def _inputs_last(leaf: ParameterLayout) -> ParameterLayout:
    """The layout of a matrix with the axis of its inputs behind the others."""
    inputs = leaf.record.inputs
    axes = sorted(leaf.stored_axes, key=lambda group: group == inputs)  # a stable sort
    return dataclasses.replace(leaf, tensor=leaf.tensor._replace(axes=" ".join(axes)))
