"""SwiGLU experts on rows sorted by expert: exact, and only routed rows are computed.

XLA has no dense operation whose cost follows the number of rows that each expert really gets. A loop has: expert by
expert, block by block of rows, with a trip count known only at run time. The last block of an expert reaches into the
rows of the next one; these are computed for nothing and then overwritten, because experts are visited in order. A loop
with a dynamic trip count cannot be differentiated in reverse, so the gradient is written here too.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_reduce.models.products import dot

BLOCK_MULTIPLES = (1, 2, 3, 4)  # the sizes of blocks, in units of `block_rows`; each size is compiled by itself


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_swiglu(x_MD, counts_E, matrices, masters, block_rows: int, form: str):
    """Row m, of the expert whose group of counts_E contains m, -> down(silu(gate·x) · up·x); and the masters.

    Args:
        x_MD: rows, in the compute dtype, sorted by expert.
        counts_E: rows of each expert, int32; rows past their sum give zero.
        matrices: gate [E, D, F], up [E, D, F] and down [E, F, D] in the compute dtype. No gradient flows into them.
        masters: what the matrices were cast from. Not read: they are handed on, so that their gradient, coming back
            from whoever uses them next, is where this call adds its own, in place. (The gradient of a pool that all
            layers use would otherwise be made of zeros and added up once a layer.) Empty: experts are frozen.
        block_rows: rows of the smallest block.
        form: of the products (see models/products.py).
    """
    return _forward(x_MD, counts_E, matrices, masters, block_rows, form)[0]


def _slice(rows, start, size):
    return _values(lax.dynamic_slice_in_dim(_bits(rows), start, size))


def _update(rows, block, start):
    """Into a buffer of bits: XLA on CPU turns a whole bf16 buffer into fp32 and back for each update of a part."""
    return lax.dynamic_update_slice_in_dim(rows, _bits(block), start, axis=0)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16) if bits.dtype == jnp.uint16 else bits


def _for_each_block(counts_E, block_rows: int, body, matrices, carry):
    """body(carry, expert, its matrices, size, start, rows_left) for every block of every expert.

    A block takes the smallest of a few static sizes that holds all rows of its expert (one matmul an expert is the
    usual case: preparing its weights costs more than rows for nothing), and the largest, again and again, where none
    does. The choice is a chain of loops and not a `switch`, and empty experts are left out of the list and not skipped
    by a `cond`: XLA copies the carried buffers around a conditional, and updates them in place in a loop.
    """
    starts_E = jnp.cumsum(counts_E) - counts_E
    (used_E,) = jnp.nonzero(counts_E > 0, size=counts_E.shape[0], fill_value=0)
    matrices = tuple(_bits(matrix) for matrix in matrices)
    sizes = [0] + [block_rows * multiple for multiple in BLOCK_MULTIPLES]

    def visit(index, carry):
        expert = used_E[index]
        mine = tuple(_values(bits[expert]) for bits in matrices)
        state = (jnp.int32(0), carry)
        for smaller, size in reversed(list(itertools.pairwise(sizes))):

            def block(state, size=size):
                done, carry = state
                left = counts_E[expert] - done
                return done + size, body(carry, expert, mine, size, starts_E[expert] + done, left)

            state = lax.while_loop(lambda state, least=smaller: counts_E[expert] - state[0] > least, block, state)
        return state[1]

    return lax.fori_loop(0, jnp.sum(counts_E > 0), visit, carry)


def _padded(rows: int, columns: int, block_rows: int, dtype) -> jax.Array:
    return _bits(jnp.zeros((rows + block_rows * BLOCK_MULTIPLES[-1], columns), dtype))


def _forward(x_MD, counts_E, matrices, masters, block_rows: int, form: str):
    rows, width = x_MD.shape
    hidden, dtype = matrices[0].shape[2], x_MD.dtype
    x_MD = jnp.pad(x_MD, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))

    def body(carry, expert, mine, size, start, left):
        del expert
        y, gates, ups = carry
        gate_DF, up_DF, down_FD = mine
        x = _slice(x_MD, start, size)
        gate, up = dot(x, gate_DF, 1, 0, form).astype(dtype), dot(x, up_DF, 1, 0, form).astype(dtype)
        valid = (jnp.arange(size) < left)[:, None]
        block = jnp.where(valid, dot(jax.nn.silu(gate) * up, down_FD, 1, 0, form).astype(dtype), 0)
        return _update(y, block, start), _update(gates, gate, start), _update(ups, up, start)

    empty = tuple(_padded(rows, columns, block_rows, dtype) for columns in (width, hidden, hidden))
    y, gates, ups = _for_each_block(counts_E, block_rows, body, matrices, empty)
    return (_values(y[:rows]), masters), (x_MD, counts_E, matrices, gates, ups)


def _backward(block_rows: int, form: str, saved, cotangents):
    x_MD, counts_E, matrices, gates, ups = saved
    dy_MD, dmasters = cotangents
    rows, dtype = dy_MD.shape[0], dy_MD.dtype
    dy_MD = jnp.pad(dy_MD, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))

    def body(carry, expert, mine, size, start, left):
        dx, dmasters = carry
        gate_DF, up_DF, down_FD = mine
        valid = (jnp.arange(size) < left)[:, None]
        # rows of the next expert have a zero here, and so everywhere below
        dy = jnp.where(valid, _slice(dy_MD, start, size), 0)
        gate, up, x = _slice(gates, start, size), _slice(ups, start, size), _slice(x_MD, start, size)
        activation, silu_vjp = jax.vjp(jax.nn.silu, gate)
        dhidden = dot(dy, down_FD, 1, 1, form).astype(dtype)
        (dgate,) = silu_vjp(dhidden * up)
        dup = dhidden * activation
        dx = _update(dx, (dot(dgate, gate_DF, 1, 1, form) + dot(dup, up_DF, 1, 1, form)).astype(dtype), start)
        if not dmasters:
            return dx, ()
        here = (dot(x, dgate, 0, 0, form), dot(x, dup, 0, 0, form), dot(activation * up, dy, 0, 0, form))
        dmasters = tuple(
            total.at[expert].add(part.astype(total.dtype)) for total, part in zip(dmasters, here, strict=True)
        )
        return dx, dmasters

    empty = _padded(rows, x_MD.shape[1], block_rows, dtype)
    dx, dmasters = _for_each_block(counts_E, block_rows, body, matrices, (empty, tuple(dmasters)))
    return _values(dx[:rows]), None, None, dmasters


grouped_swiglu.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_product(x_MI, counts_E, matrices_EIO, frozen: bool, block_rows: int, form: str):
    """Row m · the matrix of the expert whose group contains m, [M, O] in the dtype of x; rows past the groups are 0.

    A part of what `grouped_swiglu` does at once, for experts that an adapter changes. frozen: the matrices get no
    gradient, and it is not computed.
    """
    return _product_forward(x_MI, counts_E, matrices_EIO, frozen, block_rows, form)[0]


def _product_forward(x_MI, counts_E, matrices_EIO, frozen: bool, block_rows: int, form: str):
    del frozen
    y_MO = _each_product(x_MI, counts_E, matrices_EIO.astype(x_MI.dtype), 0, block_rows, form)
    return y_MO, (x_MI, counts_E, matrices_EIO)


def _each_product(x_MI, counts_E, matrices, axis: int, block_rows: int, form: str) -> jax.Array:
    """Rows of x, contracted with this axis of their expert's matrix."""
    rows, dtype = x_MI.shape[0], x_MI.dtype
    x_MI = jnp.pad(x_MI, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))

    def body(y, expert, mine, size, start, left):
        del expert
        valid = (jnp.arange(size) < left)[:, None]
        block = dot(_slice(x_MI, start, size), mine[0], 1, axis, form).astype(dtype)
        return _update(y, jnp.where(valid, block, 0), start)

    empty = _padded(rows, matrices.shape[2 - axis], block_rows, dtype)
    return _values(_for_each_block(counts_E, block_rows, body, (matrices,), empty)[:rows])


def _product_backward(frozen: bool, block_rows: int, form: str, saved, dy_MO):
    x_MI, counts_E, matrices_EIO = saved
    dx_MI = _each_product(dy_MO, counts_E, matrices_EIO.astype(dy_MO.dtype), 1, block_rows, form)
    if frozen:
        return dx_MI, None, None
    pad = ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0))
    x_MI, dy_MO = jnp.pad(x_MI, pad), jnp.pad(dy_MO, pad)

    def body(total, expert, mine, size, start, left):
        del mine
        dy = jnp.where((jnp.arange(size) < left)[:, None], _slice(dy_MO, start, size), 0)
        return total.at[expert].add(dot(_slice(x_MI, start, size), dy, 0, 0, form).astype(total.dtype))

    return dx_MI, None, _for_each_block(counts_E, block_rows, body, (), jnp.zeros_like(matrices_EIO))


grouped_product.defvjp(_product_forward, _product_backward)
