"""Gated experts on rows sorted by group, as a loop over tiles of rows that computes routed rows only.

XLA on CPU has no dense operation whose cost follows the number of rows that each expert gets. So this is a loop over
groups of rows (moe/assignments.py) and their tiles, with a trip count known only at run time. A group's last tile may
extend into the next group's rows. Its results there are wrong, and the next group, which the loop visits later,
overwrites them. JAX cannot differentiate a loop with a dynamic trip count in reverse, so its gradient is written here.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_reduce.models import deltas
from moe_reduce.models.activations import SWIGLU, Gated
from moe_reduce.models.moe.gradients import Trained, as_leaves, instantiate_zeros, primal_values, where_trained
from moe_reduce.models.products import dot, product
from moe_reduce.models.weights import multiply

TILE_MULTIPLES = (1, 2, 3, 4)  # sizes of tiles, in units of the smallest; each size is a loop in the compiled program


class Settings(NamedTuple):
    """Static settings of the loop: rows of the smallest tile, layout of operands (models/products.py), activation."""

    tile_rows: int
    layout: str
    activation: Gated = SWIGLU


def tile_rows(most: int, rows: int, groups: int) -> int:
    """Rows of the smallest tile: the average rows per group, rounded up to a power of two, at most `most`.

    A tile is always computed whole, even if few of its rows are used.
    """
    return min(most, 1 << (-(-rows // groups) - 1).bit_length())


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def loop_swiglu(x_MD, counts_J, matrices, masters, group_deltas, settings: Settings):
    """(down(activation(gate·x, up·x)) of each row by its expert, the masters).

    Args:
        x_MD: rows, in the compute dtype, sorted by group.
        counts_J: rows of each group, int32; rows past their sum give zero. Each expert has equally many groups.
        matrices: values of gate [E, D, F], up [E, D, F] and down [E, F, D], then their biases [E, 1, ·] if there are
            any. No gradient flows into them.
        masters: master weights, returned unread; empty if experts are frozen. In the backward pass their cotangent
            already holds the gradient of all later calls, and this call adds its own in place. (Otherwise each layer
            would allocate a gradient of the whole shared pool and add it to the total.)
        group_deltas: an adapter's deltas by `gate`, `up` and `down`, from `deltas.of_groups`; empty without one.
        settings: static settings.
    """
    return _forward(x_MD, counts_J, matrices, masters, group_deltas, settings)[0]


def _slice(rows, start, size):
    return _values(lax.dynamic_slice_in_dim(_bits(rows), start, size))


def _update(rows, tile, start):
    """Write a tile into a buffer viewed as bits; XLA on CPU would convert a whole bf16 buffer to fp32 and back."""
    return lax.dynamic_update_slice_in_dim(rows, _bits(tile), start, axis=0)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16) if bits.dtype == jnp.uint16 else bits


def _for_each_tile(counts_J, smallest: int, body, matrices, carry):
    """Run body(carry, group, its expert's matrices, size, start, rows_left) for every tile of every group.

    A tile has the smallest static size that holds all remaining rows of its group, or the largest size if none does.
    So most groups need one tile, even if some of its rows are unused: computing these rows costs less than preparing an
    expert's weights once more. XLA copies carried buffers around a conditional and updates them in place in a loop. For
    that reason a chain of loops chooses the size, not a `switch`, and empty groups are removed from the list, not
    skipped by a `cond`.
    """
    groups_per_expert = jnp.int32(counts_J.shape[0] // matrices[0].shape[0])
    starts_J = jnp.cumsum(counts_J) - counts_J
    (used_J,) = jnp.nonzero(counts_J > 0, size=counts_J.shape[0], fill_value=0)
    matrices = jax.tree.map(_bits, matrices)
    sizes = [0] + [smallest * multiple for multiple in TILE_MULTIPLES]

    def visit(index, carry):
        group = used_J[index]
        mine = jax.tree.map(lambda bits: _values(bits[lax.div(group, groups_per_expert)]), matrices)
        state = (jnp.int32(0), carry)
        for smaller, size in reversed(list(itertools.pairwise(sizes))):

            def tile(state, size=size):
                done, carry = state
                left = counts_J[group] - done
                return done + size, body(carry, group, mine, size, starts_J[group] + done, left)

            state = lax.while_loop(lambda state, least=smaller: counts_J[group] - state[0] > least, tile, state)
        return state[1]

    return lax.fori_loop(0, jnp.sum(counts_J > 0), visit, carry)


def _padded(rows: int, columns: int, smallest: int, dtype) -> jax.Array:
    return _bits(jnp.zeros((rows + smallest * TILE_MULTIPLES[-1], columns), dtype))


def _of_group(group_deltas, group):
    """Deltas of one group, from leaves viewed as bits: its slice of leaves [J, …]; shared leaves as they are."""
    return jax.tree.map(lambda leaf: _values(leaf[group] if leaf.ndim == 3 else leaf), group_deltas)


def _linear(x, matrix, bias, delta, layout: str):
    y = multiply(x, matrix, layout).astype(x.dtype)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape)
    return y if delta is None else y + _added(x, delta, y.shape[1], layout)


def _by_name(mine) -> tuple[dict[str, Any], dict[str, Any]]:
    """(matrices of an expert by name, its biases by name; None without them)."""
    names = ("gate", "up", "down")
    return dict(zip(names, mine[:3], strict=True)), dict(zip(names, mine[3:] or (None,) * 3, strict=True))


def _added(x, delta, outputs: int, layout: str):
    return deltas.added(x, delta, outputs, lambda x, matrix: product(x, matrix, layout))


def _marked_forward(x_MD, counts_J, matrices, masters, group_deltas, settings: Settings):
    trained = Trained.among(group_deltas)
    x_MD, counts_J, matrices, masters, group_deltas = primal_values((x_MD, counts_J, matrices, masters, group_deltas))
    result, saved = _forward(x_MD, counts_J, matrices, masters, group_deltas, settings)
    return result, (*saved, trained)


def _forward(x_MD, counts_J, matrices, masters, group_deltas, settings: Settings):
    smallest, layout, activation = settings
    rows, model_width = x_MD.shape
    expert_width, dtype = matrices[0].shape[2], x_MD.dtype
    x_MD = jnp.pad(x_MD, ((0, smallest * TILE_MULTIPLES[-1]), (0, 0)))
    bits = jax.tree.map(_bits, group_deltas)

    def body(carry, group, mine, size, start, left):
        y, gates, ups = carry
        (weights, biases), local_deltas = _by_name(mine), _of_group(bits, group)
        x = _slice(x_MD, start, size)

        def linear(x, name):
            return _linear(x, weights[name], biases[name], local_deltas.get(name), layout)

        gate, up = linear(x, "gate"), linear(x, "up")
        valid = (jnp.arange(size) < left)[:, None]
        tile = jnp.where(valid, linear(activation(gate, up), "down"), 0)
        return _update(y, tile, start), _update(gates, gate, start), _update(ups, up, start)

    empty = tuple(_padded(rows, columns, smallest, dtype) for columns in (model_width, expert_width, expert_width))
    y, gates, ups = _for_each_tile(counts_J, smallest, body, matrices, empty)
    return (_values(y[:rows]), masters), (x_MD, counts_J, matrices, group_deltas, gates, ups)


def _backward(settings: Settings, saved, cotangents):
    smallest, layout, activation = settings
    x_MD, counts_J, matrices, group_deltas, gates, ups, trained = saved
    dy_MD, dmasters = jax.tree.map(instantiate_zeros, cotangents)
    rows, dtype = dy_MD.shape[0], dy_MD.dtype
    dy_MD = jnp.pad(dy_MD, ((0, smallest * TILE_MULTIPLES[-1]), (0, 0)))
    groups_per_expert = jnp.int32(counts_J.shape[0] // matrices[0].shape[0])
    bits = jax.tree.map(_bits, group_deltas)

    def body(carry, group, mine, size, start, left):
        dx, dmasters, dgroup_deltas = carry
        (gate_DF, up_DF, down_FD, *biases), local_deltas = mine, _of_group(bits, group)
        valid = (jnp.arange(size) < left)[:, None]
        # dy is zero in rows of the next group, so those rows add nothing to any gradient below
        dy = jnp.where(valid, _slice(dy_MD, start, size), 0)
        gate, up, x = _slice(gates, start, size), _slice(ups, start, size), _slice(x_MD, start, size)
        hidden, activation_vjp = jax.vjp(activation, gate, up)
        dhidden = multiply(dy, down_FD, layout, transposed=True).astype(dtype)
        more, dgroup_deltas = _delta_vjp("down", (local_deltas, hidden, dy), dgroup_deltas, group, layout)
        dhidden = dhidden + more
        dgate, dup = activation_vjp(dhidden)
        dx_here = multiply(dgate, gate_DF, layout, transposed=True) + multiply(dup, up_DF, layout, transposed=True)
        dx_here = dx_here.astype(dtype)
        for name, dinner in (("gate", dgate), ("up", dup)):
            more, dgroup_deltas = _delta_vjp(name, (local_deltas, x, dinner), dgroup_deltas, group, layout)
            dx_here = dx_here + more
        dx = _update(dx, dx_here, start)
        if dmasters:
            here = (dot(x, dgate, 0, 0, layout), dot(x, dup, 0, 0, layout), dot(hidden, dy, 0, 0, layout))
            if biases:
                here += tuple(jnp.sum(d.astype(jnp.float32), axis=0, keepdims=True) for d in (dgate, dup, dy))
            dmasters = _add(dmasters, here, lax.div(group, groups_per_expert))
        return dx, dmasters, dgroup_deltas

    start: Any = (_padded(rows, x_MD.shape[1], smallest, dtype), tuple(dmasters), trained.totals(group_deltas))
    dx, dmasters, dgroup_deltas = _for_each_tile(counts_J, smallest, body, matrices, start)
    return _values(dx[:rows]), None, None, dmasters, as_leaves(dgroup_deltas, group_deltas)


def _delta_vjp(name: str, given: tuple[Any, Any, Any], totals, group, layout: str):
    """(gradient of x through the delta `name`, 0 if there is none; `totals` plus that delta's gradient).

    given: the group's deltas, the input rows x, and the cotangent of the output rows.
    """
    local_deltas, x, dy = given
    if name not in local_deltas:
        return 0, totals
    _, vjp = jax.vjp(lambda x, delta: _added(x, delta, dy.shape[1], layout), x, local_deltas[name])
    dx, parts = vjp(dy)
    return dx, totals | {name: _add(totals[name], parts, group)}


def _add(totals, parts, number):
    """Totals plus the gradient of one expert or group: at its index in leaves [E or J, …], or to a shared leaf."""

    def add(total, part):
        part = part.astype(total.dtype)
        return total.at[number].add(part) if total.ndim == 3 else total + part

    return where_trained(add, totals, parts)


loop_swiglu.defvjp(_marked_forward, _backward, symbolic_zeros=True)
