"""SwiGLU experts on rows sorted by expert, as Triton kernels for GPUs that compute each routed row once.

For a grouped product on NVIDIA GPUs, XLA multiplies every row with every expert and masks. Here each tile of rows
belongs to one expert, and an expert's first tile starts at its first row, whatever the number of rows of each expert.
The kernels also do the steps between products: they gather rows by token, and one kernel computes gate, up and the
activation. Operands are in the compute dtype and sums in fp32. As in all products on a GPU, fp32 operands are rounded
to TF32 unless jax_default_matmul_precision is set. Gradients of experts are added to those of the masters in place.

On other platforms the same kernels are interpreted, which is slow and meant for tests.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moe_reduce.models.moe import expert_loop
from moe_reduce.models.products import REMAT_SAVED


class Tile(NamedTuple):
    """Sizes of one kernel: columns of an output tile, contracted elements per step, and Triton's warps and stages."""

    columns: int
    inner: int
    warps: int
    stages: int

    def of(self, dtype: jnp.dtype) -> "Tile":
        """Sizes for operands of a dtype: smaller for fp32, which takes twice the memory and may take more registers."""
        if jnp.dtype(dtype).itemsize <= 2:
            return self
        return self._replace(columns=min(self.columns, 64), inner=self.inner // 2)


# For each kernel, five to eight sizes were measured on an H100. The chosen one is within 10% of the fastest and takes
# at most 96 KB of shared memory in a thread block, the limit of smaller GPUs.
MOST_ROWS = 128  # most rows of a product's tile
FEWEST_ROWS = 16  # fewest rows that the matrix units take
ONE_MATRIX = Tile(128, 64, 4, 3)
TWO_MATRICES = Tile(128, 32, 8, 4)
TWO_LEFTS = Tile(128, 32, 4, 3)
EXTRAS = Tile(128, 64, 8, 3)
OUTER_ROWS = 128
ONE_OUTER = Tile(128, 64, 4, 3)
TWO_OUTERS = Tile(64, 64, 8, 3)


class Groups(NamedTuple):
    """Ranges of sorted rows: one for each expert, E, and one for each tile of a product, T, with the tile's expert."""

    first_E: jax.Array
    end_E: jax.Array
    expert_T: jax.Array
    first_T: jax.Array  # a tile holds the rows from first_T on, at most a tile's size, and none from end_T on
    end_T: jax.Array


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a product's tile: the average rows per expert, rounded up to a power of two, within the two limits."""
    return max(FEWEST_ROWS, expert_loop.tile_rows(MOST_ROWS, rows, experts))


def groups_of(counts_E: jax.Array, rows: int) -> Groups:
    """Groups of `rows` sorted rows, of which counts_E belong to each expert.

    The number of tiles is static and suffices for any counts; tiles that they do not need are empty.
    """
    experts = counts_E.shape[0]
    size = tile_rows(rows, experts)
    tiles_E = (counts_E + size - 1) // size
    end_E, last_E = jnp.cumsum(counts_E), jnp.cumsum(tiles_E)
    first_E = end_E - counts_E
    number_T = jnp.arange(rows // size + min(rows, experts), dtype=jnp.int32)
    # compare_all, because a binary search would be a loop of small kernels
    expert_T = jnp.searchsorted(last_E, number_T, side="right", method="compare_all").astype(jnp.int32)
    used_T = expert_T < experts
    expert_T = jnp.where(used_T, expert_T, 0)
    first_T = first_E[expert_T] + (number_T - (last_E - tiles_E)[expert_T]) * size
    first_T, end_T = jnp.where(used_T, first_T, 0), jnp.where(used_T, end_E[expert_T], 0)
    return Groups(*(part.astype(jnp.int32) for part in (first_E, end_E, expert_T, first_T, end_T)))


class Term(NamedTuple):
    """One product of a kernel, by indices: sums[sum] += lefts[left] · matrices[matrix] of the row's expert."""

    left: int
    matrix: int
    sum: int


ONE = (Term(0, 0, 0),)
Finish = Callable[[Sequence[jax.Array], Sequence[jax.Array]], Sequence[jax.Array]]


def _first(sums: Sequence[jax.Array], _) -> Sequence[jax.Array]:
    return sums[:1]


class Inputs(NamedTuple):
    """Arrays that `by_rows` reads.

    lefts: sorted rows, each [M, I]; with token_M, unsorted ones, each [S, I], of which sorted row m is token_M[m].
    matrices: each [E, I, O], or [E, O, I] if the recipe is transposed. extras: each [M, O], for the recipe's `finish`.
    """

    lefts: Sequence[jax.Array]
    matrices: Sequence[jax.Array]
    token_M: jax.Array | None = None
    extras: Sequence[jax.Array] = ()


class Recipe(NamedTuple):
    """Static description of a `by_rows` kernel.

    terms: products, and the sum that each is added to. finish(sums, extras) computes a tile of each of the `results`
    outputs, in fp32.
    """

    terms: Sequence[Term] = ONE
    transposed: bool = False
    finish: Finish = _first
    results: int = 1
    tile: Tile = ONE_MATRIX


PLAIN = Recipe()


def _rows_kernel(expert_T, first_T, end_T, *refs, structure, recipe: Recipe, rows: int):
    inputs, results = structure.unflatten(refs[: structure.num_leaves]), refs[structure.num_leaves :]
    token_M, tile, transposed = inputs.token_M, recipe.tile, recipe.transposed
    number, left = pl.program_id(1), pl.program_id(0) * tile.columns
    first, end = first_T[number], end_T[number]
    inner, outputs = inputs.lefts[0].shape[1], results[0].shape[1]

    @pl.when(first < end)
    def compute():
        columns, step = tile.columns, tile.inner
        expert = expert_T[number]
        row_R, column_C = first + jnp.arange(rows), left + jnp.arange(columns)
        in_rows, in_columns = row_R < end, column_C < outputs
        # rows past the end recompute the last row, which is cheaper than a mask in every step
        source_R = jnp.minimum(row_R, end - 1)
        if token_M is not None:
            source_R = triton.load(token_M.at[source_R])

        # no mask where tiles divide the axis, because computing one costs time in every step
        inside_C = in_columns if outputs % columns else None

        def add(index, sums):
            inner_K = index * step + jnp.arange(step)
            inside_K = inner_K < inner if inner % step else None
            place = (source_R[:, None], inner_K[None, :])
            tiles = [_load(ref, place, None, inside_K) for ref in inputs.lefts]
            sums = list(sums)
            for term in recipe.terms:
                ref = inputs.matrices[term.matrix]
                if transposed:
                    matrix = _load(ref, (expert, column_C[:, None], inner_K[None, :]), inside_C, inside_K)
                else:
                    matrix = _load(ref, (expert, inner_K[:, None], column_C[None, :]), inside_K, inside_C)
                sums[term.sum] += triton.dot(tiles[term.left], matrix, trans_b=transposed)
            return tuple(sums)

        here, mask = (row_R[:, None], column_C[None, :]), in_rows[:, None] & in_columns[None, :]
        # extras are loaded before the loop, so that they arrive while it forms the sums
        extras = [triton.load(ref.at[here], mask=mask, other=0).astype(jnp.float32) for ref in inputs.extras]
        sums = tuple(jnp.zeros((rows, columns), jnp.float32) for _ in range(1 + max(term.sum for term in recipe.terms)))
        sums = lax.fori_loop(0, pl.cdiv(inner, step), add, sums)
        for result, value in zip(results, recipe.finish(sums, extras), strict=True):
            triton.store(result.at[here], value.astype(result.dtype), mask=mask)


def _load(ref, place, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """A tile, 0 where the mask `rows` or `columns` is False; None means no mask."""
    masks = [None if rows is None else rows[:, None], None if columns is None else columns[None, :]]
    given = [mask for mask in masks if mask is not None]
    if not given:
        return triton.load(ref.at[place])
    return triton.load(ref.at[place], mask=reduce(operator.and_, given), other=0)


def by_rows(inputs: Inputs, groups: Groups, interpret: bool, recipe: Recipe = PLAIN) -> list[jax.Array]:
    """Outputs of `recipe.finish`, each [M, O] in the dtype of `lefts`; undefined in rows of no expert.

    groups: ranges of the M rows. interpret: True on other platforms than GPUs.
    """
    dtype = inputs.lefts[0].dtype
    recipe = recipe._replace(tile=recipe.tile.of(dtype))
    rows = (inputs.lefts[0] if inputs.token_M is None else inputs.token_M).shape[0]
    outputs = inputs.matrices[0].shape[1 if recipe.transposed else 2]
    leaves, structure = jax.tree.flatten(inputs)
    size = tile_rows(rows, inputs.matrices[0].shape[0])
    called = pl.pallas_call(
        partial(_rows_kernel, structure=structure, recipe=recipe, rows=size),
        grid=(pl.cdiv(outputs, recipe.tile.columns), groups.expert_T.shape[0]),
        out_shape=[jax.ShapeDtypeStruct((rows, outputs), dtype)] * recipe.results,
        compiler_params=triton.CompilerParams(num_warps=recipe.tile.warps, num_stages=recipe.tile.stages),
        interpret=interpret,
        name="expert_rows",
    )
    return called(*groups[2:], *leaves)


class OuterProducts(NamedTuple):
    """Arrays that `by_matrices` reads.

    left: sorted rows [M, I]; with token_M, unsorted ones [S, I], of which sorted row m is token_M[m]. rights: each
    [M, O]. totals: one [E, I, O] for each of `rights`, to which its product is added.
    """

    left: jax.Array
    rights: Sequence[jax.Array]
    totals: Sequence[jax.Array]
    token_M: jax.Array | None = None


def _matrices_kernel(first_E, end_E, *refs, structure, tile: Tile):
    inputs, results = structure.unflatten(refs[: structure.num_leaves]), refs[structure.num_leaves :]
    token_M = inputs.token_M
    rows, columns, step = OUTER_ROWS, tile.columns, tile.inner
    expert = pl.program_id(2)
    first, end = first_E[expert], end_E[expert]
    width, outputs = inputs.left.shape[1], inputs.rights[0].shape[1]
    input_R, output_C = pl.program_id(1) * rows + jnp.arange(rows), pl.program_id(0) * columns + jnp.arange(columns)
    in_rows, in_columns = input_R < width, output_C < outputs
    inside_R, inside_C = in_rows if width % rows else None, in_columns if outputs % columns else None

    def add(index, sums):
        row_K = first + index * step + jnp.arange(step)
        inside_K = row_K < end
        source_K = row_K if token_M is None else triton.load(token_M.at[row_K], mask=inside_K, other=0)
        left = _load(inputs.left, (source_K[:, None], input_R[None, :]), inside_K, inside_R)
        rights = [_load(ref, (row_K[:, None], output_C[None, :]), inside_K, inside_C) for ref in inputs.rights]
        return tuple(total + triton.dot(left, right, trans_a=True) for total, right in zip(sums, rights, strict=True))

    sums = tuple(jnp.zeros((rows, columns), jnp.float32) for _ in inputs.rights)
    sums = lax.fori_loop(0, (end - first + step - 1) // step, add, sums)
    here, mask = (expert, input_R[:, None], output_C[None, :]), in_rows[:, None] & in_columns[None, :]
    for total, result, part in zip(inputs.totals, results, sums, strict=True):
        before = triton.load(total.at[here], mask=mask, other=0)
        triton.store(result.at[here], before + part.astype(result.dtype), mask=mask)


def by_matrices(inputs: OuterProducts, groups: Groups, interpret: bool, tile: Tile = ONE_OUTER) -> list[jax.Array]:
    """Totals plus leftᵀ · right of each expert's rows, for each of `rights`; written in place where XLA allows it."""
    tile = tile.of(inputs.left.dtype)
    totals = inputs.totals
    experts, width, outputs = totals[0].shape
    leaves, structure = jax.tree.flatten(inputs)
    before = 2 + 1 + len(inputs.rights)  # number of arguments before the totals: two of the groups, left, rights
    called = pl.pallas_call(
        partial(_matrices_kernel, structure=structure, tile=tile),
        grid=(pl.cdiv(outputs, tile.columns), pl.cdiv(width, OUTER_ROWS), experts),
        out_shape=[jax.ShapeDtypeStruct(total.shape, total.dtype) for total in totals],
        input_output_aliases={before + number: number for number in range(len(totals))},
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="expert_matrices",
    )
    return called(*groups[:2], *leaves)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x_MI: jax.Array, matrices_EIO: jax.Array, groups: Groups, interpret: bool) -> jax.Array:
    """Row m times the matrix of its expert, [M, O] in the dtype of x.

    Rows of no expert are undefined, and so are their gradients.
    """
    return by_rows(Inputs((x_MI,), (matrices_EIO,)), groups, interpret)[0]


def _product_forward(x_MI, matrices_EIO, groups, interpret):
    return product(x_MI, matrices_EIO, groups, interpret), (x_MI, matrices_EIO, groups)


def _product_backward(interpret, saved, dy_MO):
    x_MI, matrices_EIO, groups = saved
    (dx_MI,) = by_rows(Inputs((dy_MO,), (matrices_EIO,)), groups, interpret, Recipe(transposed=True))
    nothing = jnp.zeros(matrices_EIO.shape, jnp.float32)
    (dmatrices_EIO,) = by_matrices(OuterProducts(x_MI, (dy_MO,), (nothing,)), groups, interpret)
    return dx_MI, dmatrices_EIO.astype(matrices_EIO.dtype), None


product.defvjp(_product_forward, _product_backward)


def _activate(sums, _):
    gate, up = sums
    return jax.nn.sigmoid(gate) * gate * up, gate, up


def _activate_back(sums, extras):
    (dhidden,), (gate, up) = sums, extras
    share = jax.nn.sigmoid(gate)
    activation = share * gate
    return dhidden * up * (share + activation * (1 - share)), dhidden * activation


class Places(NamedTuple):
    """Origin and order of the sorted rows: token of each row, rank of each assignment, groups of experts."""

    token_M: jax.Array
    rank_SA: jax.Array
    groups: Groups


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def swiglu(x_SD, places: Places, matrices, masters, interpret: bool):
    """Outputs down(silu(gate·x) · up·x) of the sorted rows, [M, D], and the masters.

    Row m is computed from token token_M[m] by the expert whose range holds m.

    Args:
        x_SD: tokens, in the compute dtype.
        places: origin of the sorted rows. In rows of no expert, outputs are undefined and cotangents are not read.
        matrices: gate [E, D, F], up [E, D, F] and down [E, F, D] in the compute dtype. No gradient flows into them.
        masters: master weights, returned for their gradient (models/moe/expert_loop.py); empty if experts are frozen.
        interpret: True on other platforms than GPUs.
    """
    (hidden_MF,) = _inward(x_SD, places, matrices, interpret, results=1)
    return by_rows(Inputs((hidden_MF,), matrices[2:]), places.groups, interpret)[0], masters


def _inward(x_SD, places: Places, matrices, interpret, results: int):
    """Hidden, gate and up, each [M, F]: the first `results` of these."""
    inputs = Inputs((x_SD,), matrices[:2], token_M=places.token_M)
    terms = (Term(0, 0, 0), Term(0, 1, 1))
    recipe = Recipe(terms, finish=lambda *values: _activate(*values)[:results], results=results, tile=TWO_MATRICES)
    return by_rows(inputs, places.groups, interpret, recipe)


def _swiglu_forward(x_SD, places: Places, matrices, masters, interpret):
    hidden_MF, gate_MF, up_MF = _inward(x_SD, places, matrices, interpret, results=3)
    (y_MD,) = by_rows(Inputs((hidden_MF,), matrices[2:]), places.groups, interpret)
    hidden_MF, gate_MF, up_MF, y_MD = (checkpoint_name(kept, REMAT_SAVED) for kept in (hidden_MF, gate_MF, up_MF, y_MD))
    return (y_MD, masters), (x_SD, places, matrices, hidden_MF, gate_MF, up_MF)


def _swiglu_backward(interpret, saved, cotangents):
    x_SD, (token_M, rank_SA, groups), (gate_EDF, up_EDF, down_EFD), hidden_MF, gate_MF, up_MF = saved
    dy_MD, dmasters = cotangents
    inputs = Inputs((dy_MD,), (down_EFD,), extras=(gate_MF, up_MF))
    recipe = Recipe(transposed=True, finish=_activate_back, results=2, tile=EXTRAS)
    dgate_MF, dup_MF = by_rows(inputs, groups, interpret, recipe)
    inputs = Inputs((dgate_MF, dup_MF), (gate_EDF, up_EDF))
    recipe = Recipe((Term(0, 0, 0), Term(1, 1, 0)), transposed=True, tile=TWO_LEFTS)
    (dx_MD,) = by_rows(inputs, groups, interpret, recipe)
    if dmasters:
        dgate, dup, ddown = dmasters
        outer = OuterProducts(x_SD, (dgate_MF, dup_MF), (dgate, dup), token_M)
        dgate, dup = by_matrices(outer, groups, interpret, TWO_OUTERS)
        (ddown,) = by_matrices(OuterProducts(hidden_MF, (dy_MD,), (ddown,)), groups, interpret)
        dmasters = (dgate, dup, ddown)
    here_SA1 = (rank_SA < groups.end_E[-1])[:, :, None]
    dx_SD = jnp.sum(jnp.where(here_SA1, dx_MD[rank_SA], 0), axis=1)
    return dx_SD, None, None, dmasters


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
