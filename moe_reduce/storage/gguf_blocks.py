"""Blocks of 32 values in GGUF files, in the packing of our own quantised matrices: the values stay as they are.

Q8_0   fp16 scale, 32 int8                                                                 -> int8-g32
Q4_0   fp16 scale, 16 bytes: the low halves hold the first 16 values, the high ones the rest   -> int4-g32
"""

import numpy as np

from moe_reduce.core.gguf_file import StoredTensor
from moe_reduce.core.schemes import PER_BYTE, Scheme, parse

SCHEMES: dict[str, Scheme] = {"Q8_0": parse("int8-g32"), "Q4_0": parse("int4-g32")}
SCALE = np.dtype(np.float16)
VALUES = 32  # of a block


def codes(tensor: StoredTensor) -> np.ndarray:
    """Packed codes, [rows, bytes]: int8, or two 4-bit integers plus 8 in a byte."""
    blocks = _blocks(tensor)[..., SCALE.itemsize :]
    rows = len(blocks)
    if PER_BYTE[SCHEMES[tensor.kind.name].code] == 1:
        return np.ascontiguousarray(blocks).view(np.int8).reshape(rows, -1)
    values = np.concatenate([blocks & 15, blocks >> 4], axis=-1)
    return (values[..., ::2] | (values[..., 1::2] << 4)).reshape(rows, -1)


def scales(tensor: StoredTensor) -> np.ndarray:
    """Scales, fp16 [rows, blocks]."""
    return np.ascontiguousarray(_blocks(tensor)[..., : SCALE.itemsize]).view(SCALE)[..., 0]


def _blocks(tensor: StoredTensor) -> np.ndarray:
    """Bytes of each block, uint8 [rows, blocks, bytes]."""
    rows, inputs = tensor.shape
    return tensor.data.reshape(rows, inputs // VALUES, -1)
