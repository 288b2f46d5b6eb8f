"""AWQ: scales of a matrix's inputs that make rounding spare the inputs with large activations.

The inputs of a matrix are multiplied by s and its activations divided by s, which changes no product. The division is
folded into the norm, or into the matrix, that makes the activations. Source: Lin et al., arXiv:2306.00978.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

POINTS = 20  # exponents that are tried, from 0 (no scaling) to 0.95
SMALLEST = 1e-4  # of the scales before they are centred

RoundMatrices = Callable[[jax.Array], jax.Array]  # matrices [..., I, O] -> their rounded values; hashable


@partial(jax.jit, static_argnums=3)
def input_scales(
    matrices: Sequence[jax.Array], size_I: jax.Array, hessian_II: jax.Array, rounded: RoundMatrices
) -> tuple[jax.Array, jax.Array]:
    """(scales s, fp32 [I], squared error of the products with each exponent [POINTS]) for matrices with one input.

    matrices: [..., I, O] each. size_I: mean |x| of each input. hessian_II: Σ x xᵀ, which gives the exact squared error
    of the products over calibration. s = size^α, divided by √(max · min); α is the exponent with the smallest error,
    and 0 leaves the matrices as they are, so that the error never exceeds that of rounding alone.
    """
    exponents = jnp.arange(POINTS, dtype=jnp.float32) / POINTS
    errors = jax.lax.map(
        lambda exponent: scaled_error(matrices, centred(size_I, exponent), hessian_II, rounded), exponents
    )
    return centred(size_I, exponents[jnp.argmin(errors)]), errors


def centred(size_I: jax.Array, exponent: jax.Array) -> jax.Array:
    """Scales of the inputs for an exponent, with √(max · min) = 1."""
    scale_I = jnp.maximum(size_I.astype(jnp.float32) ** exponent, SMALLEST)
    return scale_I / jnp.sqrt(jnp.max(scale_I) * jnp.min(scale_I))


def scaled_error(
    matrices: Sequence[jax.Array], scale_I: jax.Array, hessian_II: jax.Array, rounded: RoundMatrices
) -> jax.Array:
    """Squared error of all products when the scaled matrices are rounded: Σ tr(Δᵀ H Δ), Δ = round(W·s)/s − W."""
    total = jnp.zeros(())
    for matrix_IO in matrices:
        spread_IO = jnp.broadcast_to(scale_I[:, None], matrix_IO.shape)
        matrix_IO = matrix_IO.astype(jnp.float32)
        total += output_error(rounded(matrix_IO * spread_IO) / spread_IO - matrix_IO, hessian_II)
    return total


def output_error(change_IO: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """Squared change of the products over calibration when a matrix changes by Δ: tr(Δᵀ H Δ)."""
    product_IO = jnp.einsum("IJ,...JO->...IO", hessian_II, change_IO, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(change_IO * product_IO)
