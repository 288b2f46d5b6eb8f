"""Log-likelihoods of continuations of contexts: each context is read once, whatever the number of its continuations.

Contexts are read in batches of bucketed lengths into a cache, and continuations go on from copies of its rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.inference.generate import Ready, bucket
from moe_reduce.models import cache
from moe_reduce.models.model import Model

Pair = tuple[Sequence[int], Sequence[int]]  # a context of at least one token, and what follows


class Scored(NamedTuple):
    """Σ log p of a continuation's tokens, and whether each of them is the most probable one."""

    log_likelihood: float
    greedy: bool


def score(model: Ready, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Scored]]:
    """(index of a pair, its score), in the order in which they are done: the longest contexts first."""
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        same = by_context.setdefault(tuple(context), {})
        same.setdefault(tuple(continuation), []).append(index)
    contexts = sorted(by_context, key=len, reverse=True)
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        places = bucket(max(len(context) for context in batch))
        # the last token of a context is the first that its continuations read
        tokens_BT, _ = _rows([context[:-1] for context in batch], batch_size, places)
        with model.place():
            read = _read(model.config, model.execution, model.stacked, places, model.params, tokens_BT)
        jobs = [
            (row, context, continuation, indices)
            for row, context in enumerate(batch)
            for continuation, indices in by_context[context].items()
        ]
        jobs.sort(key=lambda job: len(job[2]), reverse=True)
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            for job, scored in zip(part, _continue(model, read, part, batch_size), strict=False):
                yield from ((index, scored) for index in job[3])


def _rows(rows: Sequence[Sequence[int]], count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens padded on the right and below, where they count)."""
    tokens_BT = np.zeros((count, length), np.int32)
    counted_BT = np.zeros((count, length), bool)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row)] = row
        counted_BT[number, : len(row)] = True
    return tokens_BT, counted_BT


def _continue(model: Ready, read: Any, jobs: Sequence[Any], batch_size: int) -> list[Scored]:
    length = bucket(max(len(continuation) for _, _, continuation, _ in jobs))
    targets_RX, counted_RX = _rows([continuation for _, _, continuation, _ in jobs], batch_size, length)
    tokens_RX, _ = _rows(
        [(*context[-1:], *continuation[:-1]) for _, context, continuation, _ in jobs], batch_size, length
    )
    rows_R, starts_R = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for number, (row, context, _, _) in enumerate(jobs):
        rows_R[number], starts_R[number] = row, len(context) - 1
    with model.place():
        found = _score(
            model.config, model.execution, model.stacked, model.params, read, rows_R, tokens_RX, starts_R,
            targets_RX, counted_RX,
        )  # fmt: skip
    likelihood_R, greedy_R = jax.device_get(found)
    return [Scored(float(a), bool(b)) for a, b in zip(likelihood_R[: len(jobs)], greedy_R[: len(jobs)], strict=True)]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _read(config, execution, stacked: bool, places: int, params: Any, tokens_BT: jax.Array) -> Any:
    """A cache of all tokens; of places behind a row's end nobody reads."""
    # logits are made of one place only: nobody wants them
    batch = {"tokens": tokens_BT, "last": jnp.zeros(tokens_BT.shape[0], jnp.int32)}
    _, collected = Model(config, params, execution).apply(batch, collect=(cache.KEYS_VALUES,))
    return cache.of_prompts(collected[cache.KEYS_VALUES], places, False, stacked)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score(config, execution, stacked: bool, params, read, rows_R, tokens_RX, starts_R, targets_RX, counted_RX):
    """(Σ log p of the counted targets, whether all are greedy) behind row rows_R of the cache, from place starts_R."""
    own = jax.tree.map(lambda leaf: jnp.take(leaf, rows_R, axis=1 if stacked else 0), read)
    positions_RX = starts_R[:, None] + jnp.arange(tokens_RX.shape[1], dtype=jnp.int32)[None]
    batch = {"tokens": tokens_RX, "positions": positions_RX}
    logits_RXV, _ = Model(config, params, execution).apply(batch, cache=own)
    chosen_RX = jnp.take_along_axis(jax.nn.log_softmax(logits_RXV), targets_RX[:, :, None], axis=-1)[:, :, 0]
    greedy_RX = jnp.argmax(logits_RXV, axis=-1) == targets_RX
    return jnp.sum(jnp.where(counted_RX, chosen_RX, 0.0), axis=1), jnp.all(greedy_RX | ~counted_RX, axis=1)
