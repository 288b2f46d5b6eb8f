"""SwiGLU experts on rows sorted by expert: exact, and only routed rows are computed.

XLA has no dense operation whose cost follows the number of rows that each expert really gets. A loop has: expert by
expert, block by block of `block_rows` rows, with a trip count known only at run time. The last block of an expert
reaches into the rows of the next one; these are computed for nothing and then overwritten, because experts are visited
in order. A loop with a dynamic trip count cannot be differentiated in reverse, so the gradient is written here too.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_MULTIPLES = (1, 4)  # the sizes of blocks, in units of `block_rows`; more sizes only compiled longer


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_swiglu(x_MD, counts_E, gate_EDF, up_EDF, down_EFD, block_rows: int) -> jax.Array:
    """Row m, of the expert whose group of counts_E contains m, -> down(silu(gate·x) · up·x), [M, D].

    Rows past the sum of the counts give zero.
    """
    return _forward(x_MD, counts_E, gate_EDF, up_EDF, down_EFD, block_rows)[0]


def _slice(rows, start, size):
    return lax.dynamic_slice_in_dim(rows, start, size)


def _update(rows, block, start):
    return lax.dynamic_update_slice_in_dim(rows, block, start, axis=0)


def _for_each_block(counts_E, block_rows: int, body, expert_start, carry):
    """body(carry, local, size, start, rows_left) for every block; expert_start(e) gives what all its blocks share.

    A block takes the smallest of a few static sizes that holds all rows of its expert (one matmul an expert is the
    usual case: large matmuls run faster), and the largest, again and again, where none does. The choice is a chain of
    loops and not a `switch`, and empty experts are left out of the list and not skipped by a `cond`: XLA copies the
    carried buffers around a conditional, and updates them in place in a loop.
    """
    starts_E = jnp.cumsum(counts_E) - counts_E
    (used_E,) = jnp.nonzero(counts_E > 0, size=counts_E.shape[0], fill_value=0)
    sizes = [0] + [block_rows * multiple for multiple in BLOCK_MULTIPLES]

    def visit(index, carry):
        expert = used_E[index]
        local = expert_start(expert)
        state = (jnp.int32(0), carry)
        for smaller, size in reversed(list(itertools.pairwise(sizes))):

            def block(state, size=size):
                done, carry = state
                return done + size, body(carry, local, size, starts_E[expert] + done, counts_E[expert] - done)

            state = lax.while_loop(lambda state, least=smaller: counts_E[expert] - state[0] > least, block, state)
        return state[1]

    return lax.fori_loop(0, jnp.sum(counts_E > 0), visit, carry)


def _padded(rows: int, columns: int, block_rows: int, dtype) -> jax.Array:
    return jnp.zeros((rows + block_rows * BLOCK_MULTIPLES[-1], columns), dtype)


def _forward(x_MD, counts_E, gate_EDF, up_EDF, down_EFD, block_rows: int):
    rows, width = x_MD.shape
    hidden = gate_EDF.shape[2]
    x_MD = jnp.pad(x_MD, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))

    def matrices(expert):
        return gate_EDF[expert], up_EDF[expert], down_EFD[expert]

    def body(carry, local, size, start, left):
        y, gates, ups = carry
        gate_DF, up_DF, down_FD = local
        x = _slice(x_MD, start, size)
        gate, up = x @ gate_DF, x @ up_DF
        valid = (jnp.arange(size) < left)[:, None]
        block = jnp.where(valid, (jax.nn.silu(gate) * up) @ down_FD, 0)
        return _update(y, block, start), _update(gates, gate, start), _update(ups, up, start)

    empty = (
        _padded(rows, width, block_rows, x_MD.dtype),
        _padded(rows, hidden, block_rows, x_MD.dtype),
        _padded(rows, hidden, block_rows, x_MD.dtype),
    )
    y, gates, ups = _for_each_block(counts_E, block_rows, body, matrices, empty)
    return y[:rows], (x_MD, counts_E, gate_EDF, up_EDF, down_EFD, gates, ups)


def _backward(block_rows: int, saved, dy_MD):
    x_MD, counts_E, gate_EDF, up_EDF, down_EFD, gates, ups = saved
    rows = dy_MD.shape[0]
    dy_MD = jnp.pad(dy_MD, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))

    def visit_input(carry, local, size, start, left):
        dx, dgates, dups, hiddens = carry
        gate_DF, up_DF, down_FD = local
        valid = (jnp.arange(size) < left)[:, None]
        dy = jnp.where(valid, _slice(dy_MD, start, size), 0)
        gate, up = _slice(gates, start, size), _slice(ups, start, size)
        activation, silu_vjp = jax.vjp(jax.nn.silu, gate)
        dhidden = dy @ down_FD.T
        (dgate,) = silu_vjp(dhidden * up)
        dup = dhidden * activation
        dx = _update(dx, dgate @ gate_DF.T + dup @ up_DF.T, start)
        return dx, _update(dgates, dgate, start), _update(dups, dup, start), _update(hiddens, activation * up, start)

    def matrices(expert):
        return gate_EDF[expert], up_EDF[expert], down_EFD[expert]

    hidden = gates.shape[1]
    dtype = x_MD.dtype
    empty = tuple(_padded(rows, columns, block_rows, dtype) for columns in (x_MD.shape[1], hidden, hidden, hidden))
    dx, dgates, dups, hiddens = _for_each_block(counts_E, block_rows, visit_input, matrices, empty)
    dgate = _weight_gradient(x_MD, dgates, counts_E, block_rows)
    dup = _weight_gradient(x_MD, dups, counts_E, block_rows)
    ddown = _weight_gradient(hiddens, dy_MD, counts_E, block_rows)
    return dx[:rows], None, dgate, dup, ddown


def _weight_gradient(left, right, counts_E, block_rows: int):
    """Σ over the rows of each expert of left ⊗ right, [E, columns of left, columns of right]."""

    def body(carry, expert, size, start, rows_left):
        valid = (jnp.arange(size) < rows_left)[:, None]
        rows = jnp.where(valid, _slice(left, start, size), 0)
        product = rows.T @ _slice(right, start, size)
        return carry.at[expert].add(product)

    empty = jnp.zeros((counts_E.shape[0], left.shape[1], right.shape[1]), left.dtype)
    return _for_each_block(counts_E, block_rows, body, lambda expert: expert, empty)


grouped_swiglu.defvjp(_forward, _backward)
