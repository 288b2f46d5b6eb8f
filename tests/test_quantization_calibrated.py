"""GPTQ and AWQ on small layers, against plain float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.quantization import awq
from moe_reduce.quantization.gptq import DAMPENING, gptq

LARGEST = 7


def _layer(inputs, outputs=12, rows=400, seed=0):
    """A matrix and correlated activations, some inputs much larger than others."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(0, 1, (inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    sizes = np.exp(generator.normal(0, 1, inputs))
    x = generator.normal(0, 1, (rows, inputs)) @ mixing * sizes
    return generator.normal(0, 1, (inputs, outputs)), x


def _scales(matrix, group):
    """Symmetric int4: one scale for each group of inputs and each output, [G, O]."""
    return np.abs(matrix.reshape(-1, group, matrix.shape[1])).max(axis=1) / LARGEST


def _nearest(scale_GO, group, row_O, index):
    scale_O = scale_GO[index // group]
    return jnp.clip(jnp.round(row_O / scale_O), -LARGEST - 1, LARGEST) * scale_O


def _reference(matrix, hessian, group):
    """The algorithm as the paper states it, one input after the other, with the inverse updated explicitly."""
    scale = _scales(matrix, group)
    order = np.argsort(-np.diag(hessian), kind="stable")
    weights = matrix[order].copy()
    inverse = np.linalg.inv(hessian[order][:, order] + DAMPENING * np.mean(np.diag(hessian)) * np.eye(len(matrix)))
    rounded = np.zeros_like(weights)
    for i in range(len(weights)):
        step = scale[order[i] // group]
        rounded[i] = np.clip(np.round(weights[i] / step), -LARGEST - 1, LARGEST) * step
        weights[i:] -= np.outer(inverse[i:, i] / inverse[i, i], weights[i] - rounded[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rounded[np.argsort(order)]


@pytest.mark.parametrize(("inputs", "group"), [(24, 24), (160, 32)])
def test_gptq_equals_the_reference(inputs, group):
    """The second has more inputs than a block of 128."""
    matrix, x = _layer(inputs)
    hessian = x.T @ x
    scale = jnp.asarray(_scales(matrix, group), jnp.float32)
    arrays = [jnp.asarray(values, jnp.float32) for values in (matrix, hessian)]
    found = np.asarray(gptq(*arrays, _of_scales(scale, group)))
    expected = _reference(matrix, hessian, group)
    codes = [np.round(values / np.repeat(_scales(matrix, group), group, axis=0)) for values in (found, expected)]
    # a rounding error of fp32 may move a weight across the middle between two code points, and the rest follows
    assert np.mean(codes[0] != codes[1]) < 0.01
    nearest_only = np.stack([_nearest(scale, group, matrix[i], i) for i in range(inputs)])
    errors = {name: np.sum((x @ (values - matrix)) ** 2) for name, values in
              {"gptq": found, "reference": expected, "nearest": nearest_only}.items()}  # fmt: skip
    assert errors["gptq"] == pytest.approx(errors["reference"], rel=0.02)
    assert errors["gptq"] < 0.7 * errors["nearest"]


def _of_scales(scale_GO, group):
    return jax.tree_util.Partial(_nearest, scale_GO, group)


def test_gptq_without_correlations_is_rounding_to_nearest():
    matrix, _ = _layer(24)
    scale = jnp.asarray(_scales(matrix, 24), jnp.float32)
    matrix = jnp.asarray(matrix, jnp.float32)
    expected = np.stack([_nearest(scale, 24, matrix[i], i) for i in range(24)])
    for unused in (0, 3):  # the energies of inputs, of which calibration left some out
        hessian = jnp.diag(jnp.maximum(jnp.arange(24.0) + 1 - unused, 0.0))
        np.testing.assert_allclose(gptq(matrix, hessian, _of_scales(scale, 24)), expected, rtol=1e-6)


def _int4(matrix_IO):
    scale_1O = jnp.max(jnp.abs(matrix_IO), axis=0, keepdims=True) / LARGEST
    spread_IO = jnp.broadcast_to(scale_1O, matrix_IO.shape)
    return jnp.clip(jnp.round(matrix_IO / spread_IO), -LARGEST - 1, LARGEST) * spread_IO


def test_awq_equals_the_reference():
    matrices = [_layer(24, seed=seed)[0] for seed in (0, 1)]
    _, x = _layer(24)
    size, hessian = np.abs(x).mean(axis=0), x.T @ x
    errors = []
    for point in range(awq.POINTS):
        scale = np.maximum(size ** (point / awq.POINTS), 1e-4)
        scale /= np.sqrt(scale.max() * scale.min())
        total = 0.0
        for matrix in matrices:
            scaled = matrix * scale[:, None]
            step = np.abs(scaled).max(axis=0) / LARGEST
            rounded = np.clip(np.round(scaled / step), -LARGEST - 1, LARGEST) * step
            total += np.sum((x @ (rounded / scale[:, None] - matrix)) ** 2)
        errors.append(total)
    arrays = [jnp.asarray(matrix, jnp.float32) for matrix in matrices]
    scale_I, found = awq.input_scales(arrays, jnp.asarray(size, jnp.float32), jnp.asarray(hessian, jnp.float32), _int4)
    np.testing.assert_allclose(found, errors, rtol=5e-3)
    best = int(np.argmin(errors))
    assert int(np.argmin(np.asarray(found))) == best > 0
    assert min(errors) < 0.9 * errors[0]
    expected = size ** (best / awq.POINTS)
    np.testing.assert_allclose(scale_I, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-4)


def test_awq_of_even_activations_scales_nothing():
    matrix, _ = _layer(24)
    ones = jnp.ones(24)
    scale_I, _ = awq.input_scales([jnp.asarray(matrix, jnp.float32)], ones, jnp.eye(24), _int4)
    np.testing.assert_array_equal(scale_I, 1)
