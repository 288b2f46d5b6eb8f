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

from moe_reduce.models import deltas
from moe_reduce.models.moe.gradients import Trained, as_leaves, dense, values, where_trained
from moe_reduce.models.products import dot, product

BLOCK_MULTIPLES = (1, 2, 3, 4)  # the sizes of blocks, in units of `block_rows`; each size is compiled by itself


def rows_of_a_block(most: int, rows: int, experts: int) -> int:
    """The size of the smallest block: as many rows as an expert gets on average, up to a power of two, `most` at most.

    A block is computed whole, however few rows it holds.
    """
    return min(most, 1 << (-(-rows // experts) - 1).bit_length())


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def grouped_swiglu(x_MD, counts_E, matrices, masters, changes, block_rows: int, form: str):
    """Row m, of the expert whose group of counts_E contains m, -> down(silu(gate·x) · up·x); and the masters.

    Args:
        x_MD: rows, in the compute dtype, sorted by expert.
        counts_E: rows of each expert, int32; rows past their sum give zero.
        matrices: gate [E, D, F], up [E, D, F] and down [E, F, D] in the compute dtype. No gradient flows into them.
        masters: what the matrices were cast from. Not read: they are handed on, so that their gradient, coming back
            from whoever uses them next, is where this call adds its own, in place. (The gradient of a pool that all
            layers use would otherwise be made of zeros and added up once a layer.) Empty: experts are frozen.
        changes: of an adapter, by `gate`, `up` and `down` (see models/deltas.py); empty without one.
        block_rows: rows of the smallest block.
        form: of the products (see models/products.py).
    """
    return _forward(x_MD, counts_E, matrices, masters, changes, block_rows, form)[0]


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


def _of_expert(changes, expert):
    """An adapter's leaves, given as bits, for one expert: its own of those that each has, and those of all."""
    return jax.tree.map(lambda leaf: _values(leaf[expert] if leaf.ndim == 3 else leaf), changes)


def _linear(x, matrix, delta, form: str):
    y = dot(x, matrix, 1, 0, form).astype(x.dtype)
    return y if delta is None else y + _added(x, delta, y.shape[1], form)


def _added(x, delta, outputs: int, form: str):
    return deltas.added(x, delta, outputs, lambda x, matrix: product(x, matrix, form))


def _marked_forward(x_MD, counts_E, matrices, masters, changes, block_rows: int, form: str):
    trained = Trained.among(changes)
    x_MD, counts_E, matrices, masters, changes = values((x_MD, counts_E, matrices, masters, changes))
    result, saved = _forward(x_MD, counts_E, matrices, masters, changes, block_rows, form)
    return result, (*saved, trained)


def _forward(x_MD, counts_E, matrices, masters, changes, block_rows: int, form: str):
    rows, width = x_MD.shape
    hidden, dtype = matrices[0].shape[2], x_MD.dtype
    x_MD = jnp.pad(x_MD, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))
    bits = jax.tree.map(_bits, changes)

    def body(carry, expert, mine, size, start, left):
        y, gates, ups = carry
        gate_DF, up_DF, down_FD = mine
        own = _of_expert(bits, expert)
        x = _slice(x_MD, start, size)
        gate, up = _linear(x, gate_DF, own.get("gate"), form), _linear(x, up_DF, own.get("up"), form)
        valid = (jnp.arange(size) < left)[:, None]
        block = jnp.where(valid, _linear(jax.nn.silu(gate) * up, down_FD, own.get("down"), form), 0)
        return _update(y, block, start), _update(gates, gate, start), _update(ups, up, start)

    empty = tuple(_padded(rows, columns, block_rows, dtype) for columns in (width, hidden, hidden))
    y, gates, ups = _for_each_block(counts_E, block_rows, body, matrices, empty)
    return (_values(y[:rows]), masters), (x_MD, counts_E, matrices, changes, gates, ups)


def _backward(block_rows: int, form: str, saved, cotangents):
    x_MD, counts_E, matrices, changes, gates, ups, trained = saved
    dy_MD, dmasters = jax.tree.map(dense, cotangents)
    rows, dtype = dy_MD.shape[0], dy_MD.dtype
    dy_MD = jnp.pad(dy_MD, ((0, block_rows * BLOCK_MULTIPLES[-1]), (0, 0)))
    bits = jax.tree.map(_bits, changes)

    def body(carry, expert, mine, size, start, left):
        dx, dmasters, dchanges = carry
        gate_DF, up_DF, down_FD = mine
        own = _of_expert(bits, expert)
        valid = (jnp.arange(size) < left)[:, None]
        # rows of the next expert have a zero here, and so everywhere below
        dy = jnp.where(valid, _slice(dy_MD, start, size), 0)
        gate, up, x = _slice(gates, start, size), _slice(ups, start, size), _slice(x_MD, start, size)
        activation, silu_vjp = jax.vjp(jax.nn.silu, gate)
        dhidden = dot(dy, down_FD, 1, 1, form).astype(dtype)
        more, dchanges = _change_vjp("down", own, activation * up, dy, dchanges, expert, form)
        dhidden = dhidden + more
        (dgate,) = silu_vjp(dhidden * up)
        dup = dhidden * activation
        dx_here = (dot(dgate, gate_DF, 1, 1, form) + dot(dup, up_DF, 1, 1, form)).astype(dtype)
        for name, dinner in (("gate", dgate), ("up", dup)):
            more, dchanges = _change_vjp(name, own, x, dinner, dchanges, expert, form)
            dx_here = dx_here + more
        dx = _update(dx, dx_here, start)
        if dmasters:
            here = (dot(x, dgate, 0, 0, form), dot(x, dup, 0, 0, form), dot(activation * up, dy, 0, 0, form))
            dmasters = _add(dmasters, here, expert)
        return dx, dmasters, dchanges

    empty = _padded(rows, x_MD.shape[1], block_rows, dtype)
    nothing = trained.totals(changes)
    dx, dmasters, dchanges = _for_each_block(counts_E, block_rows, body, matrices, (empty, tuple(dmasters), nothing))
    return _values(dx[:rows]), None, None, dmasters, as_leaves(dchanges, changes)


def _change_vjp(name: str, own, x, dy, totals, expert, form: str):
    """What an adapter's change of this name, if there is one, gives back to x; and the totals with its own gradient."""
    if name not in own:
        return 0, totals
    _, vjp = jax.vjp(lambda x, delta: _added(x, delta, dy.shape[1], form), x, own[name])
    dx, parts = vjp(dy)
    return dx, totals | {name: _add(totals[name], parts, expert)}


def _add(totals, parts, expert):
    """One expert's parts, onto its own rows of the totals, or onto the totals of what all experts share."""

    def add(total, part):
        part = part.astype(total.dtype)
        return total.at[expert].add(part) if total.ndim == 3 else total + part

    return where_trained(add, totals, parts)


grouped_swiglu.defvjp(_marked_forward, _backward, symbolic_zeros=True)
