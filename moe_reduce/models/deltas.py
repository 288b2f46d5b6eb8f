"""Deltas: the changes ΔW that adapters make to matrices, applied to x factor by factor, without forming ΔW.

An adapter is the variable collection `ADAPTER`, with one delta at the path of each adapted matrix. A delta is a dict.
With I inputs, O outputs and k inner dimensions:

    in     {"matrix" [I, k]}, or {"signs" [Ip], "rows" int32 [k]} of a subsampled Hadamard transform
    core   [k, k]; or its factors core_left [k, r] and core_right [r, k]; if absent, the identity
    out    {"matrix" [k, O]}, or {"signs" [Op], "rows" int32 [k]}
    scale  scalar
    magnitude  [O], DoRA only
    present    scalar, DoRA only: 1 in layers with the adapter, 0 in others
    dropout    {"key" uint32 [2], "share" scalar}, in training only: sets a share of x to 0 (adapters/dropout.py)

Ip and Op are I and O rounded up to a power of two. ΔW = scale · outᵀ · core · inᵀ, [O, I], and y = x·(W + ΔW)ᵀ. LoRA
(arXiv:2106.09685) has in = Aᵀ and out = Bᵀ; SkeMA has fixed in and out and trains the core; DoRA (arXiv:2402.09353)
rescales the rows of W + ΔW to `magnitude`. Per-expert leaves have a leading E axis.

A bank is the same tree for Z adapters, called its entries, under the key `BANK` of the parameters. The matrices of in,
core and out have an axis Z in front of their last two axes: [Z, I, k], or [E, Z, I, k] with experts. Leaves without
that axis, such as scale and equal projections, are shared by all entries. In the collection `ADAPTER` each delta of a
bank also has

    entry  int32 [B], the entry of each batch row, 0..Z-1

Each batch row is computed with its own entry. An entry whose matrices are zero has no effect. A bank cannot hold DoRA.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.models import products

ADAPTER = "adapter"
BANK = "adapters"
ENTRY = "entry"
STACKS = ("dense_layers", "layers")  # branches of parameters whose leaves are stacked over layers (models/records.py)
SMALLEST_SQUARE = 1e-30  # lower bound of ‖w + Δw‖² of an output; DoRA divides by its square root
RADIX = 16  # size of the matrices that compute the Hadamard transform, which is faster than butterfly additions
Delta = Mapping[str, Any]
Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def variables(params: Mapping[str, Any], entries_B: jax.Array | None = None) -> dict[str, Any]:
    """Variables for Decoder.apply: the adapter or bank in `params`, if any, becomes the collection `ADAPTER`.

    entries_B: for each batch row, its entry in the bank. UserError if only one of bank and entries is given.
    """
    base = {name: leaf for name, leaf in params.items() if name not in (ADAPTER, BANK)}
    if (entries_B is not None) != (BANK in params):
        raise UserError("a bank of adapters and batch['adapter'], the entry of each row, come together: give both")
    if len(base) == len(params):
        return {"params": base}
    deltas = every_layer(params)
    if entries_B is not None:
        deltas = {name: _with_entries(branch, _stack(params, name), entries_B) for name, branch in deltas.items()}
    return {"params": base, ADAPTER: deltas}


def every_layer(params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter or bank in `params`, with zeros in the layers that it does not cover."""
    deltas = params[BANK if BANK in params else ADAPTER]
    return {name: _spread(branch, _stack(params, name)) for name, branch in deltas.items()}


def _stack(params: Mapping[str, Any], name: str) -> Any:
    """The branch of this name of the parameters; None if it is no stack of layers."""
    return params[name] if name in STACKS and name in params else None


def _layers(stacked: Any) -> int:
    """Number of layers of a stacked parameter."""
    return jax.tree.leaves(stacked)[0].shape[0]


def _with_entries(tree: Mapping[str, Any], base: Any, entries_B: jax.Array) -> dict[str, Any]:
    """The tree with the entries of the batch rows in each delta, repeated for each layer of a stack.

    base: the parameters of a stack that the deltas belong to; None for those of no stack.
    """
    if "scale" in tree:
        shape = entries_B.shape if base is None else (_layers(base), *entries_B.shape)
        return {**tree, ENTRY: jnp.broadcast_to(entries_B, shape)}
    return {
        name: _with_entries(branch, None if base is None else base[name], entries_B) for name, branch in tree.items()
    }


def _spread(tree: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """Deltas with zeros in the layers that they do not cover.

    base: the parameters of a stack that they belong to; None: not stacked, or unstacked after that was done.
    """
    if base is None:
        return dict(tree)
    if "scale" not in tree:
        return {name: _spread(branch, base[name]) for name, branch in tree.items()}
    layers = _layers(base)
    rest = {name: leaf for name, leaf in tree.items() if name != "layer_numbers"}
    if len(rest) == len(tree) or tree["layer_numbers"].shape[0] == layers:
        return rest
    numbers = tree["layer_numbers"]
    return jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype).at[numbers].set(leaf), rest)


def bank_size(tree: Mapping[str, Any]) -> int:
    """Number of entries, Z, of a bank."""
    if "scale" not in tree:
        return max(map(bank_size, tree.values()))
    shared = 2 + ("layer_numbers" in tree)  # a leaf that all entries share has at most so many axes
    return max(leaf.shape[-3] if leaf.ndim > shared else 0 for leaf in jax.tree.leaves(tree))


def delta_of(module: nn.Module, name: str) -> Delta | None:
    """Delta of the matrix `name` of a module; None if no adapter changes that matrix."""
    return module.get_variable(ADAPTER, name) if module.has_variable(ADAPTER, name) else None


def added(x: jax.Array, delta: Delta, outputs: int, multiply: Multiply) -> jax.Array:
    """x·ΔWᵀ, [..., O] in the dtype of x. multiply(x, matrix) -> x·matrix with sums in fp32.

    DoRA deltas need the base matrix as well: see `adapted`.
    """
    assert "magnitude" not in delta, "DoRA rescales the outputs of single matrices, not of experts"
    inward, outward = delta["in"], delta["out"]
    x = _dropped(x, delta["dropout"]) if "dropout" in delta else x
    z = multiply(x, inward["matrix"]) if "matrix" in inward else srht(x, inward["signs"], inward["rows"])
    if "core" in delta:
        z = multiply(z, jnp.swapaxes(delta["core"], -1, -2))
    elif "core_left" in delta:
        z = multiply(multiply(z, jnp.swapaxes(delta["core_right"], -1, -2)), jnp.swapaxes(delta["core_left"], -1, -2))
    if "matrix" in outward:
        y = multiply(z, outward["matrix"])
    else:
        y = srht_transposed(z, outward["signs"], outward["rows"], outputs)
    return y * jnp.broadcast_to(delta["scale"], y.shape).astype(y.dtype)


def _dropped(x: jax.Array, dropout: Mapping[str, jax.Array]) -> jax.Array:
    """x with a random share of its elements set to 0, and the others scaled so that the mean stays."""
    kept = 1.0 - dropout["share"]
    mask = jax.random.bernoulli(jax.random.wrap_key_data(dropout["key"]), kept, x.shape)
    return jnp.where(mask, x * jnp.broadcast_to(1.0 / kept, x.shape).astype(x.dtype), jnp.zeros_like(x))


def adapted(
    x_SI: jax.Array, y_SO: jax.Array, matrix: Callable[[], jax.Array], delta: Delta, multiply: Multiply
) -> jax.Array:
    """Outputs of x·(W + ΔW)ᵀ, given y_SO = x·Wᵀ. matrix() returns Wᵀ [I, O] and is called for DoRA only.

    multiply: as in `added`.
    """
    if ENTRY in delta:
        return y_SO + _added_by_row(x_SI, delta, y_SO.shape[1], multiply)
    low_rank = {name: leaf for name, leaf in delta.items() if name not in ("magnitude", "present")}
    y_SO = y_SO + added(x_SI, low_rank, y_SO.shape[1], multiply)
    if "magnitude" not in delta:
        return y_SO
    length_O = jax.lax.stop_gradient(_lengths(matrix(), delta))  # as in the paper: no gradient through the norm
    factor_O = jnp.where(delta["present"] > 0, delta["magnitude"].astype(length_O.dtype) / length_O, 1.0)
    return y_SO * jnp.broadcast_to(factor_O, y_SO.shape).astype(y_SO.dtype)


def _added_by_row(x_SI: jax.Array, delta: Delta, outputs: int, multiply: Multiply) -> jax.Array:
    """x·ΔWᵀ with each batch row's own entry of a bank, [S, O] in the dtype of x; products are batched over rows.

    multiply: as in `added`; x and matrix may also share a leading axis B.
    """
    entry_B = delta[ENTRY]
    own = jax.tree.map(lambda leaf: leaf[entry_B] if leaf.ndim == 3 else leaf, without_entry(delta))
    x_BTI = x_SI.reshape(entry_B.shape[0], -1, x_SI.shape[1])

    def of_rows(x_BTI: jax.Array, matrix: jax.Array) -> jax.Array:
        if matrix.ndim == 3:
            return multiply(x_BTI, matrix)
        flat = multiply(x_BTI.reshape(-1, x_BTI.shape[2]), matrix)  # shared by all rows
        return flat.reshape(*x_BTI.shape[:2], -1)

    return added(x_BTI, own, outputs, of_rows).reshape(-1, outputs)


def without_entry(delta: Delta) -> Delta:
    """The delta without `entry`."""
    return {name: leaf for name, leaf in delta.items() if name != ENTRY}


def entries(delta: Delta) -> int:
    """Number of entries, Z, of a delta of experts in a bank; 0 for a delta of a single adapter."""
    return max(leaf.shape[1] if leaf.ndim == 4 else 0 for leaf in jax.tree.leaves(delta))


def of_groups(delta: Delta, experts: int) -> Delta:
    """A bank's delta of experts with the axes E and Z of its leaves joined to J = E·Z groups, expert · Z + entry.

    Projections that experts share, [Z, I, k], are repeated for each expert. A delta of a single adapter is unchanged.
    """
    if not entries(delta):
        return delta

    def grouped(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 3:
            leaf = jnp.broadcast_to(leaf[None], (experts, *leaf.shape))
        return leaf.reshape(-1, *leaf.shape[2:]) if leaf.ndim == 4 else leaf

    return jax.tree.map(grouped, delta)


def _lengths(matrix_IO: jax.Array, delta: Delta) -> jax.Array:
    """‖w_o + Δw_o‖ of every output, fp32 [O], from the factors of ΔW, without forming it."""
    dtype = products.accumulation_dtype(matrix_IO.dtype)
    w_IO, in_IK, out_KO = (x.astype(dtype) for x in (matrix_IO, delta["in"]["matrix"], delta["out"]["matrix"]))
    out_KO = out_KO * delta["scale"].astype(dtype)
    multiply = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    cross_O = jnp.sum(out_KO * multiply(in_IK.T, w_IO), axis=0)
    square_O = jnp.sum(out_KO * multiply(multiply(in_IK.T, in_IK), out_KO), axis=0)
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w_IO), axis=0) + 2 * cross_O + square_O, SMALLEST_SQUARE))


def srht(x: jax.Array, signs: jax.Array, rows: jax.Array) -> jax.Array:
    """Subsampled Hadamard transform S·x of the last axis, I -> k: signs, orthonormal transform, then k of its rows.

    The last axis is first padded with zeros to the length of `signs`, a power of two. No matrix of that size is formed
    (arXiv:1011.1595).
    """
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, signs.shape[0] - x.shape[-1])])
    return hadamard(padded * jnp.broadcast_to(signs, padded.shape).astype(x.dtype))[..., rows]


def srht_transposed(z: jax.Array, signs: jax.Array, rows: jax.Array, outputs: int) -> jax.Array:
    """Sᵀ·z on the last axis, cut to the first `outputs` elements."""
    spread = jnp.zeros((*z.shape[:-1], signs.shape[0]), z.dtype).at[..., rows].set(z, unique_indices=True)
    turned = hadamard(spread)
    return (turned * jnp.broadcast_to(signs, turned.shape).astype(z.dtype))[..., :outputs]


def hadamard(x: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of the last axis, whose length is a power of two; O(d log d).

    The matrix of size 16·16·… is a Kronecker product of small ones, each of which is applied along one axis.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"a Hadamard transform has a power of two of elements, not {size}")
    left = x.astype(products.accumulation_dtype(x.dtype)).reshape(-1, size)
    rows, done = left.shape[0], 1
    while done < size:
        radix = min(RADIX, size // done)
        matrix = jnp.asarray(hadamard_matrix(radix), left.dtype)
        split = left.reshape(rows * (size // (done * radix)), radix, done)
        left = jnp.einsum("xri,rq->xqi", split, matrix, precision=jax.lax.Precision.HIGHEST)
        done *= radix
    return (left.reshape(x.shape) / math.sqrt(size)).astype(x.dtype)


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's matrix of ±1, [size, size]."""
    return hadamard_rows(np.arange(size), size)


def hadamard_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """Some rows of Sylvester's matrix of ±1, [rows, size]."""
    return 1.0 - 2.0 * (np.bitwise_count(rows[:, None] & np.arange(size)) % 2)
