"""The gated delta rule (Gated DeltaNet, arXiv:2412.06464), computed in chunks of tokens.

A head's state S [C, W] maps keys to values. A token with key k, value v, rate β and decay g changes it to

    S ← e^g·S + β·k·(v − kᵀ·e^g·S)ᵀ

and reads its output qᵀ·S. Within a chunk, the changes of all tokens follow from a triangular system (arXiv:2406.06484),
so that products of matrices replace a loop over tokens. All is in fp32.

Letters here: R heads, C key width, W value width, I chunks of P tokens each.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 64  # tokens
product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class Steps(NamedTuple):
    """Inputs of T tokens: queries, keys and values of each head, rates β, and log decays g ≤ 0."""

    q_BTRC: jax.Array
    k_BTRC: jax.Array
    v_BTRW: jax.Array
    beta_BTR: jax.Array
    decay_BTR: jax.Array


class Chunk(NamedTuple):
    """P tokens of `Steps`, with heads before tokens.

    total_BRP: sum of the log decays since the token's document began, or the chunk if that is later. counts_BP: number
    of documents that began in the chunk, up to each token; None if each row is one document.
    """

    q_BRPC: jax.Array
    k_BRPC: jax.Array
    v_BRPW: jax.Array
    beta_BRP: jax.Array
    total_BRP: jax.Array
    counts_BP: jax.Array | None

    def follows(self) -> jax.Array:
        """[B or 1, 1, P, P]: whether token i comes after token j, or is j, in one document."""
        earlier = jnp.tri(self.total_BRP.shape[2], dtype=bool)[None, None]
        if self.counts_BP is None:
            return earlier
        return earlier & (self.counts_BP[:, None, :, None] == self.counts_BP[:, None, None, :])


def delta_rule(steps: Steps, state_BRCW: jax.Array, starts_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(outputs [B, T, R, W], state after the last token), fp32.

    state_BRCW: before the first token. starts_BT: True at the first token of each document, which finds that state
    again; None if each row is one document.
    """
    time = steps.q_BTRC.shape[1]
    size = min(CHUNK, time)

    def by_chunk(x: jax.Array) -> jax.Array:
        """[B, T, ...] as [I, B, P, ...]; a token of padding has β = 0 and g = 0, and changes no state."""
        padded = jnp.pad(x, [(0, 0), (0, -time % size)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    heads = Steps(*(by_chunk(x.astype(jnp.float32)).swapaxes(2, 3) for x in steps))
    starts_IBP = None if starts_BT is None else by_chunk(starts_BT)

    def run(state_BRCW: jax.Array, chunk: tuple[Steps, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        return _run(state_BRCW, first_BRCW, _chunk(*chunk))

    first_BRCW = state_BRCW = state_BRCW.astype(jnp.float32)
    state_BRCW, out_IBRPW = jax.lax.scan(run, state_BRCW, (heads, starts_IBP))
    out_BIPRW = out_IBRPW.transpose(1, 0, 3, 2, 4)
    return out_BIPRW.reshape(out_BIPRW.shape[0], -1, *out_BIPRW.shape[3:])[:, :time], state_BRCW


def _chunk(steps: Steps, starts_BP: jax.Array | None) -> Chunk:
    """A chunk. steps: with heads before tokens."""
    q_BRPC, k_BRPC, v_BRPW, beta_BRP, decay_BRP = steps
    total_BRP = jnp.cumsum(decay_BRP, axis=2)
    if starts_BP is None:
        return Chunk(q_BRPC, k_BRPC, v_BRPW, beta_BRP, total_BRP, None)
    # sums never grow, so that the least one in front of a start up to here is that of the latest start
    before_BRP = jnp.where(starts_BP[:, None], total_BRP - decay_BRP, 0)
    total_BRP = total_BRP - jax.lax.cummin(before_BRP, axis=2)
    counts_BP = jnp.cumsum(starts_BP.astype(jnp.int32), axis=1)
    return Chunk(q_BRPC, k_BRPC, v_BRPW, beta_BRP, total_BRP, counts_BP)


def _run(state_BRCW: jax.Array, first_BRCW: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """(state after a chunk, its outputs [B, R, P, W])."""
    q_BRPC, k_BRPC, v_BRPW, beta_BRP, total_BRP, counts_BP = chunk
    # masked before exp, whose overflow would spoil gradients; X numbers the earlier tokens that are read
    between_BRPX = jnp.where(chunk.follows(), total_BRP[..., :, None] - total_BRP[..., None, :], -jnp.inf)
    left_BRPX = jnp.exp(between_BRPX)

    def inherited(x_BRPC: jax.Array) -> jax.Array:
        """Values that vectors read in the state before the chunk, or for documents that begin in it, in the first."""
        read_BRPW = product("BRPC,BRCW->BRPW", x_BRPC, state_BRCW)
        if counts_BP is not None:
            first_BRPW = product("BRPC,BRCW->BRPW", x_BRPC, first_BRCW)
            read_BRPW = jnp.where(counts_BP[:, None, :, None] > 0, first_BRPW, read_BRPW)
        return read_BRPW * jnp.exp(total_BRP)[..., None]

    overlap_BRPX = product("BRPC,BRXC->BRPX", k_BRPC * beta_BRP[..., None], k_BRPC) * left_BRPX
    wanted_BRPW = (v_BRPW - inherited(k_BRPC)) * beta_BRP[..., None]
    written_BRPW = product("BRPX,BRXW->BRPW", unit_inverse(overlap_BRPX), wanted_BRPW)
    scores_BRPX = product("BRPC,BRXC->BRPX", q_BRPC, k_BRPC) * left_BRPX
    out_BRPW = inherited(q_BRPC) + product("BRPX,BRXW->BRPW", scores_BRPX, written_BRPW)
    if counts_BP is not None:
        state_BRCW = jnp.where(counts_BP[:, -1, None, None, None] > 0, first_BRCW, state_BRCW)
    kept_BRPC = k_BRPC * left_BRPX[:, :, -1, :, None]
    state_BRCW = state_BRCW * jnp.exp(total_BRP[:, :, -1, None, None])
    return state_BRCW + product("BRPC,BRPW->BRCW", kept_BRPC, written_BRPW), out_BRPW


def unit_inverse(matrix: jax.Array) -> jax.Array:
    """Inverse of the lower triangular matrices [..., P, P] whose diagonal is 1, of which only what lies below counts.

    Blocks on the diagonal are inverted, twice as large at each step, by products alone: exports and accelerators have
    no solver for triangular systems that is as fast. Unlike a power series, this is as accurate as substitution.
    """
    size = matrix.shape[-1]
    rows, columns = np.arange(size)[:, None], np.arange(size)[None, :]
    inverse, block = jnp.broadcast_to(jnp.eye(size, dtype=matrix.dtype), matrix.shape), 1
    while block < size:
        below = (rows // block == columns // block + 1) & (rows // block % 2 == 1)
        step = product("...PX,...XY->...PY", inverse, jnp.where(below, matrix, 0))
        inverse = inverse - product("...PX,...XY->...PY", step, inverse)
        block *= 2
    return inverse
