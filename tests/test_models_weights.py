"""Int8 weights: error bounds, products and gradients beside dense ones, and models that run on them everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_weights import experts_of
from quantised_models import quantise_int8
from quantised_values import INT8, int8

from moe_reduce.adapters import adapter as adapters
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.inference.generate import generate
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.moe.dispatch import DISPATCHES, Assigned
from moe_reduce.models.moe.experts import cast_experts
from moe_reduce.models.parameters import abstract_params, parameters
from moe_reduce.models.weights import Quantised, Weight, dequantised, grouped_matmul, logits, lookup, matmul, quantise

EXECUTION = ExecutionConfig(platform="cpu", dispatch="blocks", block_rows=4)


def _normal(seed, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.fixture(params=["tiny_dense", "tiny_neox", "tiny_shared", "tiny_layer_moe"])
def config(request):
    return request.getfixturevalue(request.param)


def dense_model(model: Model) -> Model:
    """The dense model that a quantised one stands for."""
    leaves = {path: dequantised(leaf, jnp.float32) for path, leaf in trees.flatten(model.params).items()}
    return model.with_params(trees.unflatten(leaves))


def test_records_are_what_initialisation_makes(config):
    params = trees.flatten(init_params(config, jax.random.key(0)))
    assert {path: leaf.shape for path, leaf in params.items()} == {p.path: p.shape for p in parameters(config)}
    for record in parameters(config):
        assert set(record.inputs + record.outputs) <= set(record.axes), record.path
        assert len(record.mesh_axes) == len(record.axes) == len(record.shape), record.path


def test_int8_is_off_by_at_most_half_a_step(config):
    params = trees.flatten(init_params(config, jax.random.key(0)))
    for record in parameters(config):
        if record.is_matrix:
            found = quantise(params[record.path], record, INT8)
            kept = [size for axis, size in enumerate(record.shape) if axis not in record.contracted]
            assert jnp.squeeze(found.scales, record.contracted[0]).shape == tuple(kept), record.path
            error = np.abs(np.asarray(found.dequantised()) - np.asarray(params[record.path]))
            steps = np.expand_dims(np.squeeze(np.asarray(found.scales), record.contracted[0]), record.contracted)
            assert np.all(error <= 0.5001 * steps), record.path
            assert np.abs(np.asarray(found.codes)).max() == 127, record.path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_their_gradients_are_those_of_the_dense_matrix(dtype, transposed):
    layout = "transposed" if dtype == "bfloat16" else "plain"
    x = _normal(0, 5, 7, 16 if transposed else 12, dtype=dtype)
    whole = jnp.round(127 * jax.random.uniform(jax.random.key(1), (12, 16), minval=-1)).astype(jnp.int8)
    value = int8(whole, 0.01 * jax.random.uniform(jax.random.key(2), (16,)))

    def total(x, value):
        y = matmul(x, Weight(value, layout=layout), transposed)
        assert y.dtype == x.dtype
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    found = jax.grad(lambda x: total(x, value)[0])(x), total(x, value)[1]
    array = value.dequantised(dtype)
    wanted = jax.grad(lambda x: total(x, array)[0])(x), total(x, array)[1]
    tolerance = 1e-5 if dtype == "float32" else 6e-2
    for ours, theirs in zip(found, wanted, strict=True):
        scale = float(jnp.max(jnp.abs(theirs)))
        np.testing.assert_allclose(ours.astype("float32"), theirs.astype("float32"), atol=tolerance * scale)


def test_a_table_is_read_by_row_and_multiplied_by_output():
    whole = jnp.round(127 * jax.random.uniform(jax.random.key(1), (11, 6), minval=-1)).astype(jnp.int8)
    table = Weight(int8(whole, jax.random.uniform(jax.random.key(2), (11,)), outputs_first=True))
    array = table.value.dequantised()
    tokens = jnp.array([[3, 0], [10, 3]])
    np.testing.assert_allclose(lookup(tokens, table, jnp.float32), array[tokens], rtol=1e-6)
    np.testing.assert_allclose(logits(_normal(0, 2, 2, 6), table), _normal(0, 2, 2, 6) @ array.T, rtol=1e-5, atol=1e-5)


def test_grouped_products_read_each_experts_matrix():
    whole = jnp.round(127 * jax.random.uniform(jax.random.key(1), (3, 4, 5), minval=-1)).astype(jnp.int8)
    value = int8(whole, jax.random.uniform(jax.random.key(2), (3, 5)))
    rows = _normal(0, 3, 2, 4)
    y = grouped_matmul(rows, Weight(value), lambda rows, matrices: jnp.einsum("EXI,EIO->EXO", rows, matrices))
    np.testing.assert_allclose(y, jnp.einsum("EXI,EIO->EXO", rows, value.dequantised()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["blocks", "ragged", "grouped", "capacity"])
def test_experts_in_int8_are_dispatched_like_dense_ones(name):
    shapes = ((4, 8, 6), (4, 8, 6), (4, 6, 8))
    quantised = []
    for seed, shape in enumerate(shapes):
        whole = jnp.round(127 * jax.random.uniform(jax.random.key(seed), shape, minval=-1)).astype(jnp.int8)
        quantised.append(int8(whole, 0.01 * jax.random.uniform(jax.random.key(9 + seed), (4, shape[2]))))
    arrays = [value.dequantised() for value in quantised]
    rows = Assigned(_normal(5, 20, 8), jax.random.randint(jax.random.key(6), (20, 2), 0, 4), jnp.full((20, 2), 0.5))
    execution = dataclasses.replace(EXECUTION, capacity_factor=4.0)
    experts, masters = experts_of(tuple(quantised))
    assert masters == (), "a quantised value has nothing that trains"

    def total(x_SD, experts, name):
        y_SD = DISPATCHES[name](rows._replace(x_SD=x_SD), experts, (), execution).y_SD
        return jnp.sum(jnp.sin(y_SD)), y_SD

    ours = jax.value_and_grad(total, has_aux=True)(rows.x_SD, experts, name)
    dense_experts, _ = experts_of(tuple(arrays), trained=False)
    theirs = jax.value_and_grad(total, has_aux=True)(rows.x_SD, dense_experts, "reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_quantised_experts_are_never_cast():
    value = int8(jnp.ones((1, 2, 2), jnp.int8), jnp.ones((1, 2)))
    experts, _ = experts_of((value, value, value), "bfloat16")
    again, _ = cast_experts(experts, jnp.bfloat16, trained=True)
    assert all(value.codes.dtype == jnp.int8 for value in again.values)


def test_an_adapter_is_part_of_an_exact_product_and_refused_on_a_transposed_one():
    matrix, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    delta = {"in": {"matrix": jnp.ones((4, 1))}, "out": {"matrix": jnp.ones((1, 4))}, "scale": jnp.float32(1)}
    np.testing.assert_allclose(matmul(x, Weight(matrix, delta)), 8)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = matmul(x.astype(dtype), Weight(matrix * (1 + 2**-20), delta, fp32_products=True))
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, 8 + 2**-18)
    with pytest.raises(AssertionError, match="take no adapter"):
        matmul(x, Weight(matrix, delta), transposed=True)


def test_a_quantised_model_runs_as_the_model_it_stands_for(config):
    model = Model(config, init_params(config, jax.random.key(0)), EXECUTION)
    small = quantise_int8(model)
    assert all(not isinstance(leaf, Quantised) for leaf in trees.flatten(model.params).values()), (
        "the input is unchanged"
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)
    expected, found = dense_model(small)(tokens), small(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(expected))))
    assert float(jnp.max(jnp.abs(found - model(tokens)))) > 0
    prompts, settings = [[1, 2, 3], [4, 5]], GenerateConfig(max_tokens=6)
    assert generate(small, prompts, settings) == generate(dense_model(small), prompts, settings)


def test_quantising_abstract_leaves_gives_the_shapes_of_real_ones(config):
    real = quantise_int8(Model(config, init_params(config, jax.random.key(0)), EXECUTION))
    planned = quantise_int8(Model(config, abstract_params(config), EXECUTION))
    described = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (real.params, planned.params)]
    assert described[0] == described[1]
    assert real.config == planned.config


def test_an_adapter_learns_over_an_int8_base(tiny_layer_moe):
    """Gradients of a LoRA over int8 are those of the same LoRA over the dense matrices."""
    model = Model(tiny_layer_moe, init_params(tiny_layer_moe, jax.random.key(0)), EXECUTION)
    small = quantise_int8(model)
    adapter = adapters.init(AdapterConfig(targets="attention,mlp", rank=2), model)
    noise = iter(jax.random.split(jax.random.key(3), 99))
    leaves = {
        path: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape) if path.endswith("matrix") else leaf
        for path, leaf in trees.flatten(adapter.tree).items()
    }
    tree = trees.unflatten(leaves)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, tiny_layer_moe.vocab_size)

    def total(tree, base):
        logits_BTV = base.with_params(base.params | {"adapter": tree}).apply({"tokens": tokens}).logits_BTV
        return jnp.mean(jnp.square(logits_BTV))

    gradients = [jax.grad(total, allow_int=True)(tree, base) for base in (small, dense_model(small))]
    for path, (ours, theirs) in enumerate(zip(*map(jax.tree.leaves, gradients), strict=True)):
        if ours.dtype == jnp.float32:
            scale = max(float(jnp.max(jnp.abs(theirs))), 1e-6)
            np.testing.assert_allclose(ours, theirs, atol=1e-3 * scale, err_msg=str(path))


def test_quantising_twice_is_refused(tiny_dense):
    small = quantise_int8(Model(tiny_dense, init_params(tiny_dense, jax.random.key(0)), EXECUTION))
    with pytest.raises(UserError, match="quantised already"):
        quantise_int8(small)
    with pytest.raises(UserError, match="has no 'attnetion'"):
        quantise_int8(small, keep=("attnetion",))
