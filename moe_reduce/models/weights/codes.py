"""Code points of quantised values, and their packing into bytes along the inputs of a matrix.

A value is its code point times a scale. Bytes hold the first of their values in the lowest bits:

    int8     int8, two's complement
    int4     4 bits, the integer plus 8
    fp8      float8_e4m3fn
    nf4      4 bits, index of `NF4`
    mxfp4    4 bits, e2m1: a sign and an index of `E2M1`
    ternary  five values in a byte: v = Σ digit · 3^(4 - place), of digits 0, 1, 2 for -1, 0, 1, stored as ⌈v·256/243⌉
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.schemes import PER_BYTE, Code

# Quantiles of a Gaussian on [-1, 1], with an exact zero (QLoRA, arXiv:2305.14314, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # magnitudes of 4-bit floats
EVEN = (False, True, False, True, False, True, False)  # a tie between neighbours of E2M1 rounds up, to the even one
LARGEST = {"int8": 127, "int4": 7, "fp8": 448.0, "nf4": 1.0, "mxfp4": 6.0, "ternary": 1}
SMALLEST = {"int8": -128, "int4": -8}
DIGITS = PER_BYTE["ternary"]


def nearest(x: jax.Array, code: Code) -> jax.Array:
    """Codes of the code points nearest to x, fp32, as integers before packing: signed for int8 and int4, else uint8."""
    if code in SMALLEST:
        return jnp.clip(jnp.round(x), SMALLEST[code], LARGEST[code]).astype(jnp.int8)
    if code == "fp8":
        return jnp.clip(x, -LARGEST[code], LARGEST[code]).astype(jnp.float8_e4m3fn)
    if code == "ternary":
        return (jnp.clip(jnp.round(x), -1, 1) + 1).astype(jnp.uint8)
    if code == "nf4":
        return sum((x > middle).astype(jnp.uint8) for middle in (NF4[1:] + NF4[:-1]) / 2)  # type: ignore[return-value]
    size, index = jnp.abs(x), jnp.zeros(x.shape, jnp.uint8)
    for middle, up in zip((E2M1[1:] + E2M1[:-1]) / 2, EVEN, strict=True):
        index = index + ((size >= middle) if up else (size > middle)).astype(jnp.uint8)
    return index + 8 * jnp.signbit(x).astype(jnp.uint8)


def points(codes: jax.Array, code: Code) -> jax.Array:
    """Code points of unpacked codes, fp32; inverse of `nearest`."""
    if code == "ternary":
        return codes.astype(jnp.float32) - 1
    if code == "nf4":
        return jnp.asarray(NF4)[codes]
    if code == "mxfp4":
        return jnp.asarray(np.concatenate([E2M1, -E2M1]))[codes]
    return codes.astype(jnp.float32)


def pack(codes: jax.Array, code: Code) -> jax.Array:
    """Codes [..., I, O] in bytes [..., ⌈I / values in a byte⌉, O]; the last byte is filled up with zeros."""
    count = PER_BYTE[code]
    if count == 1:
        return codes
    if code == "int4":
        codes = (codes + 8).astype(jnp.uint8)
    spare = -codes.shape[-2] % count
    filled = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, spare), (0, 0)], constant_values=_zero(code))
    parts = filled.reshape(*codes.shape[:-2], -1, count, codes.shape[-1])
    if count == 2:
        return parts[..., 0, :] | (parts[..., 1, :] << 4)
    number: Any = sum(parts[..., place, :].astype(jnp.uint16) * 3 ** (DIGITS - 1 - place) for place in range(DIGITS))
    return ((number * 256 + 242) // 243).astype(jnp.uint8)


def unpack(packed: jax.Array, code: Code, inputs: int) -> jax.Array:
    """Codes [..., I, O] of bytes; inverse of `pack`."""
    if PER_BYTE[code] == 1:
        return packed
    parts = jnp.stack(planes(packed, code), axis=-2)
    codes = parts.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :inputs, :]
    return codes.astype(jnp.int8) - 8 if code == "int4" else codes


def planes(packed: jax.Array, code: Code) -> list[jax.Array]:
    """Codes of the first value of each byte, of the second, …, uint8, each [..., bytes, O]."""
    if PER_BYTE[code] == 2:
        return [packed & 15, packed >> 4]
    # ⌈v·256/243⌉ · 3^place, modulo 256, is what the first `place` digits leave of the byte as a fraction of 256
    rest = [packed * jnp.uint8(3**place) for place in range(DIGITS)]
    return [((left.astype(jnp.uint16) * 3) >> 8).astype(jnp.uint8) for left in rest]


def _zero(code: Code) -> int:
    return {"int4": 8, "nf4": 7, "ternary": 1}.get(code, 0)
