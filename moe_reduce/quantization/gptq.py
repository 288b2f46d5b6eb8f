"""GPTQ: rounding of a matrix, input by input, that makes up for each error in the inputs still to be rounded.

Source: Frantar et al., arXiv:2210.17323, with its activation order, in blocks of 128 inputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128  # inputs rounded before the rest of the matrix is updated
DAMPENING = 0.01  # share of the mean of the Hessian's diagonal that is added to the diagonal
Nearest = Callable[[jax.Array, jax.Array], jax.Array]  # (weights of one input [O], its index) -> code points [O]


@jax.jit
def gptq(matrix_IO: jax.Array, hessian_II: jax.Array, nearest: Nearest) -> jax.Array:
    """Round a matrix so that its products change least on average, fp32 [I, O].

    hessian_II: Σ x xᵀ over calibration inputs x, in any scale. nearest: a jax.tree_util.Partial that gives the code
    points nearest to the weights of one input; their scales must be fixed beforehand, because inputs are rounded in the
    order of their energy, largest first. Inputs that calibration never used are rounded to nearest.
    """
    inputs, outputs = matrix_IO.shape
    matrix_IO, hessian_II = matrix_IO.astype(jnp.float32), hessian_II.astype(jnp.float32)
    order_I = jnp.argsort(-jnp.diag(hessian_II))
    spare = -inputs % BLOCK
    upper_II = jnp.pad(_inverse_factor(hessian_II[order_I][:, order_I]), (0, spare))
    upper_II = upper_II + jnp.diag((jnp.arange(inputs + spare) >= inputs).astype(jnp.float32))
    rows_IO = jnp.pad(matrix_IO[order_I], [(0, spare), (0, 0)])
    place_I = jnp.pad(order_I, (0, spare))

    def block(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows_IO, rounded_IO = state
        start = number * BLOCK
        upper_BI = jax.lax.dynamic_slice(upper_II, (start, 0), (BLOCK, inputs + spare))
        rounded_BO, errors_BO = _block(
            jax.lax.dynamic_slice(rows_IO, (start, 0), (BLOCK, outputs)),
            jax.lax.dynamic_slice(upper_BI, (0, start), (BLOCK, BLOCK)),
            jax.lax.dynamic_slice(place_I, (start,), (BLOCK,)),
            nearest,
        )
        change_IO = jnp.matmul(upper_BI.T, errors_BO, precision=jax.lax.Precision.HIGHEST)
        later_I1 = (jnp.arange(inputs + spare) >= start + BLOCK)[:, None]
        rows_IO = rows_IO - jnp.where(later_I1, change_IO, 0.0)
        return rows_IO, jax.lax.dynamic_update_slice(rounded_IO, rounded_BO, (start, 0))

    blocks = (inputs + spare) // BLOCK
    _, rounded_IO = jax.lax.fori_loop(0, blocks, block, (rows_IO, jnp.zeros_like(rows_IO)))
    return rounded_IO[jnp.argsort(order_I)]


def _block(rows_BO: jax.Array, upper_BB: jax.Array, place_B: jax.Array, nearest: Nearest):
    """Round the inputs of a block one after the other: (code points, errors by which later blocks change)."""

    def one(number: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        rows_BO, rounded_BO, errors_BO = state
        rounded_O = nearest(rows_BO[number], place_B[number])
        error_O = (rows_BO[number] - rounded_O) / upper_BB[number, number]
        later_B = jnp.where(jnp.arange(BLOCK) > number, upper_BB[number], 0.0)
        rows_BO = rows_BO - later_B[:, None] * error_O[None]
        return rows_BO, rounded_BO.at[number].set(rounded_O), errors_BO.at[number].set(error_O)

    zeros = jnp.zeros_like(rows_BO)
    _, rounded_BO, errors_BO = jax.lax.fori_loop(0, BLOCK, one, (rows_BO, zeros, zeros))
    return rounded_BO, errors_BO


def _inverse_factor(hessian_II: jax.Array) -> jax.Array:
    """Upper triangular U with H⁻¹ = Uᵀ·U, for the dampened H, from one Cholesky factor and no inverse of H.

    With both axes reversed, H = L·Lᵀ; then U is L⁻¹, reversed again.
    """
    diagonal_I = jnp.diag(hessian_II)
    added_I = jnp.where(diagonal_I > 0, 0.0, 1.0) + DAMPENING * jnp.mean(diagonal_I)
    lower_II = jnp.linalg.cholesky((hessian_II + jnp.diag(added_I))[::-1, ::-1])
    identity_II = jnp.eye(hessian_II.shape[0], dtype=jnp.float32)
    return jax.scipy.linalg.solve_triangular(lower_II, identity_II, lower=True)[::-1, ::-1]
