"""Log-likelihoods of continuations, where each context is computed once for all of its continuations.

Contexts are read into a KV cache in batches of padded lengths. All continuations of a context then follow in one row,
each as a segment that attends to the context and to itself.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.inference import lengths
from moe_reduce.inference.generate import on_mesh
from moe_reduce.models import cache
from moe_reduce.models.decoder import STACK
from moe_reduce.models.model import Model

Pair = tuple[Sequence[int], Sequence[int]]  # a context of at least one token, and its continuation
LEAST_READ, LEAST_PACK = 16, 4  # shortest rows of contexts and of continuations
PACK = 64  # tokens of several continuations in one row, which bounds the memory of their logits


class Score(NamedTuple):
    """Σ log p of a continuation's tokens, and whether each of them is the most probable one."""

    log_likelihood: float
    greedy: bool


class Continuation(NamedTuple):
    """Token ids, and the indices of the pairs that ask for them."""

    ids: tuple[int, ...]
    indices: list[int]


class Context(NamedTuple):
    """Token ids, and packs of their continuations: those of a pack share a row."""

    ids: tuple[int, ...]
    packs: list[list[Continuation]]


class Packed(NamedTuple):
    """A batch of B packs of T tokens. Row b continues row rows_B[b] of the cache."""

    rows_B: np.ndarray
    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray  # number of the continuation within its pack, from 1; 0 at padding


class Sizes(NamedTuple):
    """Padded lengths of contexts and packs, rows of a batch, and the cost of one more program in tokens."""

    reads: list[int]
    packs: list[int]
    rows: int
    program: float


def score(model: Model, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Score]]:
    """Score (context, continuation) pairs on a model from `prepared`: (index of the pair, score), longest first.

    Equal pairs are computed once.
    """
    contexts = _contexts(pairs)
    sizes = _sizes(model, contexts, batch_size)
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        filled = _filled(model, batch, sizes)
        packs = [(row, pack) for row, context in enumerate(batch) for pack in context.packs]
        packs.sort(key=lambda placed: _length(placed[1]), reverse=True)
        for start in range(0, len(packs), batch_size):
            yield from _scores(model, filled, batch, packs[start : start + batch_size], sizes)


def _contexts(pairs: Sequence[Pair]) -> list[Context]:
    """Pairs by context, the longest first."""
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        same = by_context.setdefault(tuple(context), {})
        same.setdefault(tuple(continuation), []).append(index)
    contexts = [Context(ids, _packs(continuations)) for ids, continuations in by_context.items()]
    return sorted(contexts, key=lambda context: len(context.ids), reverse=True)


def _packs(continuations: dict[tuple[int, ...], list[int]]) -> list[list[Continuation]]:
    """Packs of at most `PACK` tokens; a longer continuation is alone."""
    packs: list[list[Continuation]] = []
    for ids in sorted(continuations, key=len, reverse=True):
        if not packs or _length(packs[-1]) + len(ids) > PACK:
            packs.append([])
        packs[-1].append(Continuation(ids, continuations[ids]))
    return packs


def _length(pack: list[Continuation]) -> int:
    return sum(len(continuation.ids) for continuation in pack)


def _sizes(model: Model, contexts: Sequence[Context], batch_size: int) -> Sizes:
    program = lengths.program_cost(model)
    # the last token of a context is the first that its continuations read
    reads = [len(context.ids) - 1 for context in contexts if len(context.ids) > 1]
    found = lengths.sizes(reads, program, LEAST_READ)
    packs = [_length(pack) for context in contexts for pack in context.packs]
    return Sizes(found, lengths.sizes(packs, program * max(1, len(found)), LEAST_PACK), batch_size, program)


def _filled(model: Model, batch: Sequence[Context], sizes: Sizes) -> Any:
    """A cache with all tokens of the contexts but their last; None if there are no others."""
    longest = len(batch[0].ids) - 1
    if longest == 0:
        return None
    slots = lengths.padded(longest, sizes.reads)
    rows = lengths.batch_rows(len(batch), sizes.rows, slots, sizes.program)
    tokens_BT, ends_B = np.zeros((rows, slots), np.int32), np.zeros(rows, np.int32)
    for number, context in enumerate(batch):
        ends_B[number] = len(context.ids) - 1
        tokens_BT[number, : ends_B[number]] = context.ids[:-1]
    with on_mesh(model):
        return _read(model.config, model.execution, slots, model.params, tokens_BT, ends_B)


def _scores(
    model: Model,
    filled: Any,
    contexts: Sequence[Context],
    packs: Sequence[tuple[int, list[Continuation]]],
    sizes: Sizes,
) -> Iterator[tuple[int, Score]]:
    """Score packs of continuations, each with the row of its context."""
    length = lengths.padded(_length(packs[0][1]), sizes.packs)
    rows = lengths.batch_rows(len(packs), sizes.rows, length, sizes.program)
    packed = Packed(np.zeros(rows, np.int32), *(np.zeros((rows, length), np.int32) for _ in range(4)))
    for row, (place, pack) in enumerate(packs):
        _lay_out(packed, row, place, contexts[place].ids, pack)
    with on_mesh(model):
        scored = jax.device_get(_score(model.config, model.execution, model.params, filled, packed))
    for row, (_, pack) in enumerate(packs):
        chosen_T, greedy_T = scored[0][row], scored[1][row]
        for number, continuation in enumerate(pack, 1):
            own_T = packed.segments_BT[row] == number
            found = Score(float(chosen_T[own_T].sum(dtype=np.float64)), bool(greedy_T[own_T].all()))
            yield from ((index, found) for index in continuation.indices)


def _lay_out(packed: Packed, row: int, place: int, context: Sequence[int], pack: Sequence[Continuation]) -> None:
    """Write a pack into its row: each continuation reads the context's last token first, and its own last not."""
    packed.rows_B[row] = place
    start = 0
    for number, (ids, _) in enumerate(pack, 1):
        own = slice(start, start + len(ids))
        packed.tokens_BT[row, own] = (context[-1], *ids[:-1])
        packed.targets_BT[row, own] = ids
        packed.positions_BT[row, own] = np.arange(len(context) - 1, len(context) - 1 + len(ids))
        packed.segments_BT[row, own] = number
        start = own.stop


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    config: ModelConfig,
    execution: ExecutionConfig,
    slots: int,
    params: Any,
    tokens_BT: jax.Array,
    ends_B: jax.Array,
) -> Any:
    """Fill a cache with all tokens; slots behind a row's end are never attended to. ends_B: lengths of the rows."""
    batch = lengths.padded_batch(config, tokens_BT, ends_B)
    batch["last"] = jnp.zeros(tokens_BT.shape[0], jnp.int32)  # logits of a single position, because none are needed
    _, collected = Model(config, params, execution).apply(batch, collect=(cache.KEYS_VALUES,))
    return cache.of_prompts(collected[cache.KEYS_VALUES], slots, "auto", STACK in params)


@partial(jax.jit, static_argnums=(0, 1))
def _score(config: ModelConfig, execution: ExecutionConfig, params: Any, filled: Any, batch: Packed):
    """(log p of the targets, whether they are the most probable tokens), each [B, T]."""
    given = {"tokens": batch.tokens_BT, "positions": batch.positions_BT, "segments": batch.segments_BT}
    copied = None
    if filled is not None:
        copied = jax.tree.map(lambda leaf: jnp.take(leaf, batch.rows_B, axis=1 if STACK in params else 0), filled)
    logits_BTV, _ = Model(config, params, execution).apply(given, cache=copied)
    chosen_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[:, :, None], axis=-1)[:, :, 0]
    greedy_BT = jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1), greedy_BT
