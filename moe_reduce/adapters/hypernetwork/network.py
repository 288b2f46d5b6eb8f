"""The network of a hypernetwork: descriptions, layers and modules -> values of an adapter's leaves.

Trunk and heads are those of Text-to-LoRA (arXiv:2506.06105). Experts, which the source does not have, add an embedding
of their own where the side of a factor adds its embedding.

Every head starts with a weight of zero. Head L has a bias per factor. Heads M and S serve both factors, so their bias
belongs to A alone: A = W·h + b and B = W·h. The bias of B, and of M and S the whole of B, is therefore zero at the
start while A is a LoRA's usual start, and ΔW = 0. A head S has one bias for all ranks: each rank multiplies it with its
own row of signs of a Hadamard matrix, so that the rows of A differ from each other at the start.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters.hypernetwork.layout import SIDES, Layout, Place, rows_of
from moe_reduce.adapters.projections import padded_size
from moe_reduce.models.deltas import hadamard_rows

TASK, EMBEDDED, WIDTH, HIDDEN = 64, 32, 128, 512
ROTARY_THETA = 10_000.0
Emitted = dict[str, jax.Array]
Dense = partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)


class Network(nn.Module):
    """Embeddings [Z, W] -> the leaves that a head emits, by path, [Z, N, E, ...] (see `Place.stack`)."""

    layout: Layout
    dropout: float

    @nn.compact
    def __call__(self, embeddings_ZW: jax.Array, deterministic: bool = True) -> Emitted:
        """Compute every matrix of every adapter in one pass. deterministic: False drops out, with the rng `dropout`."""
        h_ZYH = _Trunk(self.layout, self.dropout, name="trunk")(embeddings_ZW, deterministic)
        found: Emitted = {}
        start = 0
        for place in self.layout.places:
            rows = max(1, math.prod(place.stack)) * self.layout.sides * self.layout.ranks
            head = _Head(self.layout, place, name=f"head_{place.name}")
            found |= {f"{place.path}/{name}": leaf for name, leaf in head(h_ZYH[:, start : start + rows]).items()}
            start += rows
        return found


class _Trunk(nn.Module):
    """Embeddings [Z, W] -> features [Z, Y, 512] of every row."""

    layout: Layout
    dropout: float

    @nn.compact
    def __call__(self, embeddings_ZW: jax.Array, deterministic: bool) -> jax.Array:
        layout, rows = self.layout, rows_of(self.layout)
        drop = partial(nn.Dropout, self.dropout, deterministic=deterministic)
        task_ZX = _norm("task_norm")(Dense(TASK, name="task")(embeddings_ZW))
        layer_PX = _norm("layer_norm")(nn.Embed(layout.layers, EMBEDDED, name="layer")(rows.layer_P))
        module_PX = _norm("module_norm")(nn.Embed(len(layout.places), EMBEDDED, name="module")(rows.module_P))
        shape = (task_ZX.shape[0], layer_PX.shape[0])
        x_ZPX = jnp.concatenate(
            [
                jnp.broadcast_to(task_ZX[:, None], (*shape, TASK)),
                *(jnp.broadcast_to(x_PX[None], (*shape, EMBEDDED)) for x_PX in (layer_PX, module_PX)),
            ],
            axis=-1,
        )
        x_ZPX = nn.silu(Dense(HIDDEN, name="mixer_in")(drop()(x_ZPX)))
        x_ZPX = drop()(nn.silu(Dense(WIDTH, name="mixer_out")(drop()(x_ZPX))))
        x_ZPX = _Residual(self.dropout, name="residual_0")(x_ZPX, deterministic)
        x_ZYX = self._by_row(x_ZPX)
        x_ZYX = _Residual(self.dropout, name="residual_1")(x_ZYX, deterministic)
        h_ZYH = nn.silu(Dense(HIDDEN, name="last_in")(_norm("last_norm")(x_ZYX)))
        return nn.silu(Dense(HIDDEN, name="last_out")(drop()(h_ZYH)))

    def _by_row(self, x_ZPX: jax.Array) -> jax.Array:
        """Features of pairs -> features of rows, [Z, Y, 128]: told apart by expert, side and rank."""
        layout, rows = self.layout, rows_of(self.layout)
        x_ZYX = x_ZPX[:, rows.pair_Y]
        if layout.experts:
            table = nn.Embed(layout.experts, WIDTH, name="expert")
            expert_YX = _norm("expert_norm")(table(np.maximum(rows.expert_Y, 0)))
            x_ZYX = x_ZYX + jnp.where(rows.expert_Y[:, None] >= 0, expert_YX, 0.0)[None]
        if layout.sides > 1:
            table = nn.Embed(len(layout.places) * len(SIDES), WIDTH, name="side")
            x_ZYX = x_ZYX + _norm("side_norm")(table(rows.side_Y))[None]
        return _rotated(x_ZYX, rows.rank_Y) if layout.ranks > 1 else x_ZYX


class _Residual(nn.Module):
    """x + MLP(LayerNorm(x)), 128 -> 512 -> 128."""

    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        drop = partial(nn.Dropout, self.dropout, deterministic=deterministic)
        h = drop()(nn.silu(Dense(HIDDEN, name="in")(_norm("norm")(x))))
        return x + drop()(Dense(WIDTH, name="out")(h))


class _Head(nn.Module):
    """Linear head of one module: features [Z, rows, 512] -> leaves [Z, *stack, ...] of its place."""

    layout: Layout
    place: Place

    @nn.compact
    def __call__(self, h_ZYH: jax.Array) -> Emitted:
        layout, place = self.layout, self.place
        size, longest = layout.inner, max(place.inputs, place.outputs)
        outputs = {
            "L": size * (place.inputs + place.outputs), "M": size * longest, "S": longest, "core": size * size
        }[layout.head]  # fmt: skip
        kernel = self.param("kernel", nn.initializers.zeros, (HIDDEN, outputs))
        bias = self.param("bias", partial(_bias, layout.head, place, size), (outputs,))
        y_ZYO = jnp.matmul(h_ZYH, kernel, precision=jax.lax.Precision.HIGHEST)
        y = y_ZYO.reshape(y_ZYO.shape[0], *place.stack, -1)
        if layout.head == "core":
            return {"core": _split(y + _like(bias, y), size)}
        if layout.head == "L":
            y = y + _like(bias, y)
            a, b = _split(y[..., : size * place.inputs], size), _split(y[..., size * place.inputs :], size)
        else:
            y = y.reshape(*y.shape[:-1], len(SIDES), size, longest)
            a, b = y[..., 0, :, : place.inputs], y[..., 1, :, : place.outputs]
            offset_RI = _offset(layout.head, bias, size)[:, : place.inputs]
            a = a + _like(offset_RI, a)
        return {SIDES[0]: jnp.swapaxes(a, -1, -2), SIDES[1]: b}


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, name=name)


def _split(y: jax.Array, rows: int) -> jax.Array:
    """[..., rows · O] -> [..., rows, O]."""
    return y.reshape(*y.shape[:-1], rows, -1)


def _like(value: jax.Array, y: jax.Array) -> jax.Array:
    """The value with leading axes of size 1, as many axes as `y`."""
    return value.reshape((1,) * (y.ndim - value.ndim) + value.shape)


def _offset(head: str, bias: jax.Array, size: int) -> jax.Array:
    """Bias of A, [R, max(I, O)]."""
    if head == "M":
        return _split(bias, size)
    longest = bias.shape[0]
    signs_RX = hadamard_rows(np.arange(size), padded_size(max(size, longest)))[:, :longest]
    return jnp.asarray(signs_RX, bias.dtype) * bias[None]


def _bias(head: str, place: Place, size: int, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Start of a head's bias: U(-1/√I, 1/√I) where it becomes A, as in a LoRA, and 0 elsewhere."""
    if head == "core":
        return jnp.zeros(shape)
    bound = place.inputs**-0.5
    values = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    if head == "L":
        return jnp.where(jnp.arange(shape[0]) < size * place.inputs, values, 0.0)
    longest = max(place.inputs, place.outputs)
    return jnp.where(jnp.arange(shape[0]) % longest < place.inputs, values, 0.0)


def _rotated(x_ZYX: jax.Array, rank_Y: np.ndarray) -> jax.Array:
    """Features turned by a rotary embedding of their rank (arXiv:2104.09864), which has no parameters."""
    half = x_ZYX.shape[-1] // 2
    angles_YX = rank_Y[:, None] * ROTARY_THETA ** (-np.arange(half)[None] / half)
    cos_YX, sin_YX = (jnp.asarray(turn(angles_YX), x_ZYX.dtype)[None] for turn in (np.cos, np.sin))
    left, right = x_ZYX[..., :half], x_ZYX[..., half:]
    return jnp.concatenate([left * cos_YX - right * sin_YX, right * cos_YX + left * sin_YX], axis=-1)
