"""Products of a few rows with a quantised matrix on a CPU, as decoding needs them: limited by bytes read, not by FLOPs.

Codes become fp32 a chunk at a time, small enough for the cache, so that no fp32 copy of a matrix reaches memory. Values
that share a byte are multiplied apart, by every second (or fifth) input, so that they need not be interleaved.
"""

import jax
import jax.numpy as jnp

from moe_reduce.core.schemes import PER_BYTE, Code
from moe_reduce.models.products import dot
from moe_reduce.models.weights import codes
from moe_reduce.models.weights.quantised import Quantised

MOST_ROWS = 32
CHUNK = 2**19  # values of a chunk: 2 MB in fp32
OFFSET: dict[Code, float] = {"int4": 8.0, "ternary": 1.0}  # of what `_planes` gives
HALF = {"fp8": (7, 8.0), "mxfp4": (9, 14.0)}  # shift of the magnitude into the bits of a float16, and power of two lost


def suits(rows: int, matrix: Quantised, transposed: bool) -> bool:
    """True for products that this module computes."""
    return rows <= MOST_ROWS and not transposed and matrix.scheme.scope != "block"


def multiply(x_SI: jax.Array, matrix: Quantised) -> jax.Array:
    """x · one matrix, fp32 [S, O]."""
    per_byte = PER_BYTE[matrix.scheme.code]
    spare = -x_SI.shape[1] % per_byte
    x_SI = jnp.pad(x_SI.astype(jnp.float32), [(0, 0), (0, spare)])
    return _by_outputs(x_SI, matrix) if matrix.outputs_first else _by_inputs(x_SI, matrix)


def _by_inputs(x_SI: jax.Array, matrix: Quantised) -> jax.Array:
    """Product with a matrix [I, O], in chunks of inputs."""
    code, grouped = matrix.scheme.code, matrix.scheme.scope == "group"
    size, outputs = matrix.codes.shape
    groups = matrix.grid.scales.shape[0] if grouped else 1
    chunks = _chunks(groups if grouped else size, size * PER_BYTE[code] * outputs)
    # [chunk, place in the byte, row, byte]
    x = x_SI.reshape(x_SI.shape[0], chunks, -1, PER_BYTE[code]).transpose(1, 3, 0, 2)
    # no axis of size 1: XLA would copy the matrix to give it another layout
    shape = (groups // chunks, -1, outputs) if grouped and groups > chunks else (-1, outputs)
    packed = _bytes(matrix.codes).reshape(chunks, *shape)
    of_groups = tuple(part.reshape(chunks, -1, outputs) for part in _offset_and_scales(matrix)) if grouped else ()

    def add(y_SO: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, packed, *of_groups = chunk
        for place, plane in enumerate(_planes(packed, code)):
            values = _scaled(plane, *of_groups) if of_groups else plane
            y_SO = y_SO + dot(x[place], values.reshape(-1, outputs), 1, 0, "plain")
        return y_SO, None

    start = jnp.zeros((x_SI.shape[0], outputs), jnp.float32)
    y_SO, _ = jax.lax.scan(add, start, (x, packed, *of_groups))
    return y_SO if grouped else _after(y_SO, x_SI, matrix)


def _scaled(values: jax.Array, zeros: jax.Array, scales: jax.Array) -> jax.Array:
    """Values [groups, inputs, O], or [inputs, O] of one group, from those that `_planes` gives. zeros: [groups, O]."""
    zeros, scales = (part.reshape(*values.shape[:-2], 1, values.shape[-1]) for part in (zeros, scales))
    return (values - jnp.broadcast_to(zeros, values.shape)) * jnp.broadcast_to(scales, values.shape)


def _after(y_SO: jax.Array, x_SI: jax.Array, matrix: Quantised) -> jax.Array:
    """Product with a matrix without groups, from the product with what `_planes` gives."""
    zeros, scales = _offset_and_scales(matrix)
    if matrix.zeros is not None or matrix.scheme.code in OFFSET:
        y_SO = y_SO - jnp.sum(x_SI, axis=1, keepdims=True) * zeros
    return y_SO * scales


def _by_outputs(x_SI: jax.Array, matrix: Quantised) -> jax.Array:
    """Product with a matrix [O, I], such as a token table, in chunks of outputs."""
    code, grouped = matrix.scheme.code, matrix.scheme.scope == "group"
    outputs, size = matrix.codes.shape
    chunks = _chunks(outputs, size * PER_BYTE[code] * outputs)
    x = x_SI.reshape(x_SI.shape[0], size, PER_BYTE[code])
    parts = _offset_and_scales(matrix) if grouped else ()
    of_groups = tuple(part.T.reshape(chunks, outputs // chunks, -1) for part in parts)

    def some(chunk: tuple[jax.Array, ...]) -> jax.Array:
        packed, *of_groups = chunk
        total = jnp.zeros((), jnp.float32)
        for place, values in enumerate(_planes(packed, code)):
            if of_groups:
                zeros, scales = (jnp.repeat(part, size // part.shape[1], axis=1) for part in of_groups)
                values = (values - zeros) * scales
            total = total + dot(x[:, :, place], values, 1, 1, "plain")
        return total

    packed = _bytes(matrix.codes).reshape(chunks, -1, size)
    found = jax.lax.map(some, (packed, *of_groups))
    y_SO = found.transpose(1, 0, 2).reshape(x_SI.shape[0], outputs)
    return y_SO if grouped else _after(y_SO, x_SI, matrix)


def _bytes(packed: jax.Array) -> jax.Array:
    """Codes whose dtype XLA on CPU moves as it is: it converts 8-bit floats to wider ones and back."""
    return packed if packed.dtype == jnp.int8 else jax.lax.bitcast_convert_type(packed, jnp.uint8)


def _chunks(units: int, values: int) -> int:
    """Number of chunks, a divisor of `units`, such that each has at most CHUNK values if possible."""
    least = -(-values // CHUNK)
    return next(count for count in range(min(least, units), units + 1) if units % count == 0)


def _offset_and_scales(matrix: Quantised) -> tuple[jax.Array, jax.Array]:
    """The number that is subtracted from what `_planes` gives, fp32, for each scale; and the scales, fp32 [GI, GO]."""
    grid = matrix.grid
    offset = jnp.full(grid.scales.shape, OFFSET.get(matrix.scheme.code, 0.0), jnp.float32)
    return (offset if grid.zeros is None else offset + grid.zeros.astype(jnp.float32)), grid.scales


def _planes(packed: jax.Array, code: Code) -> list[jax.Array]:
    """Code points of the first value of each byte, of the second, …, fp32; of int4 and ternary without their offset."""
    if code == "int8":
        return [packed.astype(jnp.float32)]
    if code == "fp8":
        return [_half(packed, code, 128)]
    planes = codes.planes(packed, code)
    if code == "mxfp4":
        return [_half(plane, code, 8) for plane in planes]
    return [_of_table(plane) if code == "nf4" else plane.astype(jnp.float32) for plane in planes]


def _half(bits: jax.Array, code: Code, sign: int) -> jax.Array:
    """Small floats by way of float16, whose conversion has instructions of its own. sign: the bit of the sign."""
    shift, power = HALF[code]
    wide = bits.astype(jnp.uint16)
    half = ((wide & (sign - 1)) << shift) | ((wide & sign) * (2**15 // sign))
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2.0**power


def _of_table(indices: jax.Array) -> jax.Array:
    """Values of NF4's table by a tree of selections, which is faster than 16 loads from a table."""
    level = [jnp.full(indices.shape, value, jnp.float32) for value in codes.NF4]
    for bit in range(4):
        chosen = ((indices >> bit) & 1).astype(bool)
        level = [jnp.where(chosen, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]
