"""Every scheme of quantised weights: code points, bounds, bytes, products, gradients, tables and stacks."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import NAMES, SCHEMES, Scheme, parse
from moe_reduce.models.parameters import Parameter
from moe_reduce.models.weights import Weight, grouped_matmul, logits, lookup, matmul, quantise
from moe_reduce.models.weights.codes import E2M1, NF4, nearest, pack, points, unpack

INPUTS, OUTPUTS = 128, 6
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def matrix_record(axes: str = "DF", product: str = "D F", **sizes: int) -> Parameter:
    sizes = {"D": INPUTS, "F": OUTPUTS, "N": 2, "E": 3, "V": 300, "H": 3, "C": 2} | sizes
    shape, (inputs, outputs) = tuple(sizes[x] for x in axes), product.split()
    fixed = (nn.initializers.zeros, "mlp", True, "compute", (None,) * len(axes))
    return Parameter("mlp/up", axes, shape, *fixed, inputs, outputs)


def normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Gaussian weights with a few outliers and one output of zeros."""
    random = np.random.default_rng(seed)
    weights = 0.02 * random.standard_normal(shape).astype(np.float32)
    weights.reshape(-1)[:: max(weights.size // 7, 1)] *= 6
    return weights


@partial(jax.jit, static_argnums=(1, 2))
def rounded(matrix, record: Parameter, scheme: Scheme):
    value = quantise(matrix, record, scheme)
    return value, value.dequantised()


def test_ties_between_four_bit_floats_go_to_the_even_one():
    """As in the conversion of IEEE floats, which ml_dtypes does."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    values = np.concatenate([middles, -middles, E2M1, -E2M1])
    found = points(nearest(jnp.asarray(values), "mxfp4"), "mxfp4")
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def all_points(scheme: Scheme) -> np.ndarray:
    """Every code point, by definition and not by the package's own tables."""
    if scheme.code in ("int8", "int4"):
        return np.arange(-128, 128) if scheme.code == "int8" else np.arange(-8, 8)
    if scheme.code == "fp8":
        found = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(found[np.isfinite(found)])
    if scheme.code == "mxfp4":
        return np.unique(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    return NF4.astype(np.float64) if scheme.code == "nf4" else np.array([-1, 0, 1])


@every_scheme
def test_every_value_becomes_the_nearest_code_point(scheme):
    matrix = normal((INPUTS, OUTPUTS))
    matrix[:, 2] = 0
    value, found = rounded(matrix, matrix_record(), scheme)
    block = scheme.block(INPUTS, OUTPUTS)

    def spread(part: Any) -> np.ndarray:
        return np.asarray(part, np.float64).repeat(block[0], 0)[:INPUTS].repeat(block[1], 1)[:, :OUTPUTS]

    scales = spread(value.grid.scales)
    zeros = np.zeros(scales.shape) if value.grid.zeros is None else spread(value.grid.zeros)
    points = (all_points(scheme)[None, None] - zeros[..., None]) * scales[..., None]
    least = np.abs(points - matrix[..., None]).min(-1)
    error = np.abs(np.asarray(found) - matrix)
    np.testing.assert_allclose(error, least, atol=1e-6 * np.abs(matrix).max())
    assert np.abs(points - np.asarray(found)[..., None]).min(-1).max() < 1e-6 * np.abs(matrix).max(), "a code point"
    if scheme.code in ("int8", "int4"):
        assert np.all(error <= 0.5001 * scales)
    if scheme.code in ("fp8", "mxfp4", "nf4"):
        steps = np.diff(points, axis=-1)
        place = np.clip((points < matrix[..., None]).sum(-1) - 1, 0, steps.shape[-1] - 1)
        slack = 2e-2 * np.abs(matrix).max() if scheme.code == "nf4" else 1e-7  # the largest of a block may be cut off
        assert np.all(error <= 0.5001 * np.take_along_axis(steps, place[..., None], -1)[..., 0] + slack)


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 6), (384, 130), (256, 300)])
@every_scheme
def test_bytes_are_counted_exactly(scheme, inputs, outputs):
    record = matrix_record(D=inputs, F=outputs)
    held = jax.eval_shape(lambda x: quantise(x, record, scheme), jax.ShapeDtypeStruct(record.shape, jnp.float32))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)) == scheme.bytes(inputs, outputs)
    assert held.shape == record.shape


def test_bits_of_a_weight():
    found = {str(scheme): 8 * scheme.bytes(4096, 4096) / 4096**2 for scheme in SCHEMES}
    expected = {"int8": 8.008, "int4-g128": 4.125, "int4-g32": 4.5, "nf4": 4.127, "mxfp4": 4.25, "ternary": 1.6016}
    assert {name: pytest.approx(found[name], rel=1e-3) for name in expected} == expected
    assert found["fp8-block"] == pytest.approx(8.002, rel=1e-3)
    assert [name for name, scheme in NAMES.items() if str(scheme) != name or parse(name) != scheme] == []


@pytest.mark.parametrize("code", ["int4", "nf4", "mxfp4", "ternary"])
def test_packing_loses_nothing(code):
    random = np.random.default_rng(0)
    low, high = {"int4": (-8, 8), "ternary": (0, 3)}.get(code, (0, 16))
    for inputs in (3, 243 * 5 if code == "ternary" else 64):
        codes = random.integers(low, high, (2, inputs, 3)).astype(np.int8 if code == "int4" else np.uint8)
        packed = pack(jnp.asarray(codes), code)
        assert packed.dtype == jnp.uint8
        np.testing.assert_array_equal(unpack(packed, code, inputs), codes)


def test_all_243_bytes_of_five_ternary_digits():
    digits = np.stack(np.unravel_index(np.arange(243), (3,) * 5)).astype(np.uint8)
    packed = np.asarray(pack(jnp.asarray(digits), "ternary"))
    np.testing.assert_array_equal(packed[0], -(-np.arange(243) * 256 // 243))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), "ternary", 5), digits)


@every_scheme
def test_products_gradients_tables_and_stacks(scheme):
    """One program a scheme: each product equals that with the dequantised array."""
    stacked, table = matrix_record("NEDF"), matrix_record("VD", "D V", V=130)
    heads = matrix_record("HCD", "HC D", H=32, C=4, D=5)

    @jax.jit
    def run(x, tokens):
        experts = quantise(normal(stacked.shape), stacked, scheme)
        first = jax.tree.map(lambda leaf: leaf[1], experts)
        rows = jnp.stack([x] * 3)
        product = partial(jnp.einsum, "EXI,EIO->EXO")
        words = quantise(normal(table.shape, 1), table, scheme)
        merged = quantise(normal(heads.shape, 2), heads, scheme)
        ours = {
            "grouped": grouped_matmul(rows, Weight(first), product),
            "layer": experts.dequantised()[1],
            "logits": logits(x[None], Weight(words))[0],
            "rows": lookup(tokens, Weight(words), jnp.float32),
            "heads": matmul(x.reshape(-1, 32, 4), Weight(merged, input_axes=2)),
            "back": matmul(jnp.ones((2, 5)), Weight(merged, input_axes=2), transposed=True).reshape(2, -1),
            "gradient": jax.grad(lambda x: jnp.sum(jnp.sin(matmul(x, Weight(merged.flat())))))(x),
            "many": matmul(jnp.tile(x, (10, 1)), Weight(merged.flat())),
        }
        array, flat = first.dequantised(), merged.dequantised().reshape(INPUTS, 5)
        theirs = {
            "grouped": product(rows, array), "layer": array, "logits": x @ words.dequantised().T,
            "rows": words.dequantised()[tokens], "heads": x @ flat, "back": jnp.ones((2, 5)) @ flat.T,
            "gradient": jax.grad(lambda x: jnp.sum(jnp.sin(x @ flat)))(x), "many": jnp.tile(x, (10, 1)) @ flat,
        }  # fmt: skip
        return ours, theirs

    ours, theirs = run(normal((4, INPUTS), 5), jnp.array([[0, 129], [7, 128]]))
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    assert float(jnp.abs(theirs["layer"]).max()) > 0


def test_groups_that_do_not_divide_are_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"int4-g128: groups of 128 do not divide the 576 inputs of x: choose int4-g64"):
        parse("int4-g128").fitted(576, "x")
    with pytest.raises(UserError, match=r"mxfp4: groups of 32 do not divide the 80 inputs of x: choose another scheme"):
        parse("mxfp4").fitted(80, "x")
    assert [str(parse("int4").fitted(size, "x")) for size in (1536, 576, 96)] == ["int4-g128", "int4-g64", "int4-g32"]
    with pytest.raises(UserError, match=r"scheme 'int3' is unknown; known: int8, "):
        parse("int3")
    assert dataclasses.replace(parse("int4"), group=32) == parse("int4-g32")


def test_double_quantised_scales_are_off_by_at_most_half_a_step():
    record = matrix_record(D=1024, F=40)
    value, _ = rounded(normal(record.shape), record, parse("nf4"))
    exact = np.abs(normal(record.shape)).reshape(16, 64, 40).max(1).reshape(-1)
    steps = np.asarray(value.scales.steps).repeat(256)[: exact.size]
    assert np.all(np.abs(np.asarray(value.scales.scales()).reshape(-1) - exact) <= 0.5001 * steps)
    assert steps.max() < 0.02 * exact.max()
