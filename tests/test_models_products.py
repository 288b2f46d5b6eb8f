"""Products in the compute dtype: sums and the gradients of matrices are fp32's, in both forms and for odd shapes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_weights import experts_of

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import products
from moe_reduce.models.attention import softmax
from moe_reduce.models.attention.attention import Attention
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.moe.dispatch import DISPATCHES, Assigned


def _normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 3), (7, 2, 17), (16, 33, 8), (128, 64, 33)])
@pytest.mark.parametrize("form", ["plain", "transposed"])
def test_gradients_of_fp32_matrices_are_not_rounded(form, shape):
    rows, inputs, outputs = shape
    x_SI = _normal(0, rows, inputs, dtype="bfloat16")
    matrix_IO = _normal(1, inputs, outputs)
    dy_SO = _normal(2, rows, outputs, dtype="bfloat16")
    if form == "plain":  # XLA on CPU does not take every bf16 product in this form, which is for other platforms
        x_SI, dy_SO = x_SI.astype("float32"), dy_SO.astype("float32")
    y_SO, vjp = jax.jit(lambda *a: jax.vjp(lambda *b: products.product(*b, form), *a))(x_SI, matrix_IO)
    dx_SI, dmatrix_IO = vjp(dy_SO)
    assert (y_SO.dtype, dx_SI.dtype, dmatrix_IO.dtype) == (x_SI.dtype, x_SI.dtype, jnp.float32)
    x, dy, matrix = (np.asarray(a.astype("float32"), np.float64) for a in (x_SI, dy_SO, matrix_IO.astype(x_SI.dtype)))
    np.testing.assert_allclose(dmatrix_IO, x.T @ dy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y_SO.astype("float32"), x @ matrix, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(dx_SI.astype("float32"), dy @ matrix.T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("turned", [False, True])
def test_logits_in_bf16_for_a_table_that_lies_either_way(turned):
    x_SD, table_VD = _normal(0, 32, 8, dtype="bfloat16"), _normal(1, 17, 8)

    def loss(x_SD, table):
        table_VD = table.T if turned else table
        return jnp.sum(products.logits(x_SD, table_VD, "transposed") ** 2)

    dx_SD, dtable = jax.jit(jax.grad(loss, argnums=(0, 1)))(x_SD, table_VD.T if turned else table_VD)
    x, table = np.asarray(x_SD.astype("float32")), np.asarray(table_VD.astype("bfloat16").astype("float32"))
    dlogits = np.asarray(jnp.asarray(2 * x @ table.T).astype("bfloat16").astype("float32"))
    np.testing.assert_allclose(dtable.T if turned else dtable, dlogits.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dx_SD.astype("float32"), dlogits @ table, rtol=2e-2, atol=0.2)


def test_three_passes_in_bf16_are_as_true_as_fp32():
    x_SI, matrix_IO, dy_SO = _normal(0, 64, 256, dtype="bfloat16"), _normal(1, 256, 32), _normal(2, 64, 32)
    y_SO, vjp = jax.jit(lambda *a: jax.vjp(products.fp32_product, *a))(x_SI, matrix_IO)
    dx_SI, dmatrix_IO = vjp(dy_SO)
    x, dy = np.asarray(x_SI, np.float64), np.asarray(dy_SO.astype("bfloat16"), np.float64)
    matrix = np.asarray(matrix_IO, np.float64)
    assert np.max(np.abs(y_SO - x @ matrix)) < 2e-6 * np.max(np.abs(y_SO))
    np.testing.assert_allclose(dx_SI.astype("float32"), dy @ matrix.T, rtol=2e-2, atol=0.1)
    np.testing.assert_allclose(dmatrix_IO, x.T @ dy, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_attention_and_its_gradient_are_the_softmax_formula(heads, groups, tiles, monkeypatch):
    monkeypatch.setattr(softmax, "SMALLEST_TILE", 2)  # tiles of 3, 3 and 3, whose first ones leave out keys
    batch, time, width = 2, 9, 6
    q, k, v = _normal(0, batch, time, heads, width), *(_normal(i, batch, time, groups, width) for i in (1, 2))
    mask_B1TT = jnp.broadcast_to(jnp.arange(time)[:, None] - jnp.arange(time)[None, :] < 5, (batch, 1, time, time))
    weight = _normal(3, batch, time, heads, width)
    config = ModelConfig()

    class Near(Visibility):
        def within_rows(self, time):
            return super().within_rows(time) & mask_B1TT

    def formula(q, k, v):
        k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
        scores = jnp.einsum("BTHC,BSHC->BHTS", q, k) / np.float32(np.sqrt(width))
        allowed = jnp.tril(jnp.ones((time, time), bool))[None, None] & mask_B1TT
        shares = jax.nn.softmax(jnp.where(allowed, scores, jnp.float32(-jnp.inf)), axis=-1)
        return jnp.sum(jnp.einsum("BHTS,BSHC->BTHC", shares, v) * weight)

    def ours(q, k, v):
        return jnp.sum(softmax.attention(q, k, v, Near(config), tiles=tiles) * weight)

    found = jax.value_and_grad(ours, argnums=(0, 1, 2))(q, k, v)
    wanted = jax.value_and_grad(formula, argnums=(0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_blocks_of_queries_leave_out_most_of_what_the_mask_would():
    """And the angles of the rotary embedding are computed once, not in each loop that turns a head."""
    config = ModelConfig(vocab_size=8, layers=1, width=64, query_heads=2, key_value_heads=1, head_width=32)
    x_BTD, positions_BT = _normal(0, 1, 512, 64), jnp.arange(512, dtype=jnp.int32)[None]
    flops = {}
    for attention in ("xla", "blocks"):
        attend = Attention(config, ExecutionConfig(attention=attention))
        variables = attend.init(jax.random.key(0), x_BTD, positions_BT, None)
        compiled = jax.jit(attend.apply).lower(variables, x_BTD, positions_BT, None).compile()
        flops[attention] = compiled.cost_analysis()["flops"]
    projections = 2 * 512 * 64 * (2 * 64 + 2 * 32)
    assert flops["blocks"] - projections < 0.7 * (flops["xla"] - projections)
    assert len(re.findall(r" sine\(", compiled.as_text())) == 1


@pytest.mark.parametrize("dispatch", ["blocks", "ragged", "grouped"])
def test_a_bf16_pool_adds_up_its_gradient_in_fp32(dispatch):
    """Each of many calls adds less than bf16 could resolve beside the total."""
    execution = ExecutionConfig(dispatch=dispatch, products="transposed", compute_dtype="bfloat16", block_rows=4)
    matrices = (_normal(1, 2, 8, 8), _normal(2, 2, 8, 8), _normal(3, 2, 8, 8))
    x_SD = _normal(0, 16, 8, dtype="bfloat16")
    chosen_SA = (jnp.arange(16, dtype=jnp.int32) % 2)[:, None]
    calls = 300

    def total(matrices, calls):
        experts, masters = experts_of(matrices, x_SD.dtype, layout="transposed")

        def call(masters, _):
            rows = Assigned(x_SD, chosen_SA, jnp.ones((16, 1)))
            result = DISPATCHES[dispatch](rows, experts, masters, execution)
            return result.masters, jnp.sum(result.y_SD.astype(jnp.float32))

        return jnp.sum(jax.lax.scan(call, masters, None, length=calls)[1])

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    one, many = gradient(matrices, 1), gradient(matrices, calls)
    for part, whole in zip(one, many, strict=True):
        assert whole.dtype == jnp.float32
        np.testing.assert_allclose(whole, part * calls, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("multiply", "dtype"), [(products.product, "float32"), (products.fp32_product, "bfloat16")])
def test_leading_axes_batch_a_product(multiply, dtype):
    x_BSI = jax.random.normal(jax.random.key(0), (3, 5, 8)).astype(dtype)
    matrix_BIO, dy_BSO = (
        jax.random.normal(jax.random.key(1), (3, 8, 4)),
        jax.random.normal(jax.random.key(2), (3, 5, 4)),
    )

    def both(x, matrix, dy):
        y, vjp = jax.vjp(multiply, x, matrix)
        return y, *vjp(dy.astype(y.dtype))

    together = both(x_BSI, matrix_BIO, dy_BSO)
    for row in range(3):
        for found, wanted in zip(together, both(x_BSI[row], matrix_BIO[row], dy_BSO[row]), strict=True):
            np.testing.assert_allclose(found[row].astype("float32"), wanted.astype("float32"), rtol=1e-5, atol=1e-6)
