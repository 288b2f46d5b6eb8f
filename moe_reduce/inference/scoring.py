"""Log-likelihoods of continuations, where each context is computed once for all of its continuations.

Contexts are read into a KV cache in batches of bucketed lengths; continuations start from copies of the cache's rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.inference.generate import bucket, on_mesh
from moe_reduce.models import cache
from moe_reduce.models.decoder import STACK
from moe_reduce.models.model import Model

Pair = tuple[Sequence[int], Sequence[int]]  # a context of at least one token, and its continuation


class Score(NamedTuple):
    """Σ log p of a continuation's tokens, and whether each of them is the most probable one."""

    log_likelihood: float
    greedy: bool


class Job(NamedTuple):
    """One continuation of the context in a row of the cache, and the indices of the pairs that ask for it."""

    row: int
    context: Sequence[int]
    continuation: Sequence[int]
    indices: list[int]


class Continued(NamedTuple):
    """A batch of R continuations of X tokens. Row r reads tokens_RX after slot starts_R of cache row rows_R."""

    rows_R: np.ndarray
    starts_R: np.ndarray
    tokens_RX: np.ndarray
    targets_RX: np.ndarray
    counted_RX: np.ndarray  # False at padding


def score(model: Model, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Score]]:
    """Score (context, continuation) pairs on a model from `ready`: (index of the pair, score), longest contexts first.

    Equal pairs are computed once.
    """
    by_context: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
        same = by_context.setdefault(tuple(context), {})
        same.setdefault(tuple(continuation), []).append(index)
    contexts = sorted(by_context, key=len, reverse=True)
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        slots = bucket(max(len(context) for context in batch))
        # the last token of a context is the first that its continuations read
        tokens_BT, _ = _padded([context[:-1] for context in batch], batch_size, slots)
        with on_mesh(model):
            filled = _read(model.config, model.execution, slots, model.params, tokens_BT)
        jobs = [
            Job(row, context, continuation, indices)
            for row, context in enumerate(batch)
            for continuation, indices in by_context[context].items()
        ]
        jobs.sort(key=lambda job: len(job.continuation), reverse=True)
        for start in range(0, len(jobs), batch_size):
            chosen = jobs[start : start + batch_size]
            for job, found in zip(chosen, _scores(model, filled, chosen, batch_size), strict=True):
                yield from ((index, found) for index in job.indices)


def _padded(rows: Sequence[Sequence[int]], count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [count, length], padded on the right and below; True at tokens of the rows)."""
    tokens_BT = np.zeros((count, length), np.int32)
    counted_BT = np.zeros((count, length), bool)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row)] = row
        counted_BT[number, : len(row)] = True
    return tokens_BT, counted_BT


def _scores(model: Model, filled: Any, jobs: Sequence[Job], batch_size: int) -> list[Score]:
    length = bucket(max(len(job.continuation) for job in jobs))
    targets_RX, counted_RX = _padded([job.continuation for job in jobs], batch_size, length)
    tokens_RX, _ = _padded([(*job.context[-1:], *job.continuation[:-1]) for job in jobs], batch_size, length)
    rows_R, starts_R = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for number, job in enumerate(jobs):
        rows_R[number], starts_R[number] = job.row, len(job.context) - 1
    batch = Continued(rows_R, starts_R, tokens_RX, targets_RX, counted_RX)
    with on_mesh(model):
        likelihood_R, greedy_R = jax.device_get(_score(model.config, model.execution, model.params, filled, batch))
    return [Score(float(likelihood_R[number]), bool(greedy_R[number])) for number in range(len(jobs))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(config: ModelConfig, execution: ExecutionConfig, slots: int, params: Any, tokens_BT: jax.Array) -> Any:
    """Fill a cache with all tokens; slots behind a row's end are never attended to."""
    # logits of a single position, because none are needed
    batch = {"tokens": tokens_BT, "last": jnp.zeros(tokens_BT.shape[0], jnp.int32)}
    _, collected = Model(config, params, execution).apply(batch, collect=(cache.KEYS_VALUES,))
    return cache.of_prompts(collected[cache.KEYS_VALUES], slots, False, STACK in params)


@partial(jax.jit, static_argnums=(0, 1))
def _score(config: ModelConfig, execution: ExecutionConfig, params: Any, filled: Any, batch: Continued):
    """(Σ log p of the counted targets, whether all of them are greedy), each [R]."""
    copied = jax.tree.map(lambda leaf: jnp.take(leaf, batch.rows_R, axis=1 if STACK in params else 0), filled)
    positions_RX = batch.starts_R[:, None] + jnp.arange(batch.tokens_RX.shape[1], dtype=jnp.int32)[None]
    given = {"tokens": batch.tokens_RX, "positions": positions_RX}
    logits_RXV, _ = Model(config, params, execution).apply(given, cache=copied)
    chosen_RX = jnp.take_along_axis(jax.nn.log_softmax(logits_RXV), batch.targets_RX[:, :, None], axis=-1)[:, :, 0]
    greedy_RX = jnp.argmax(logits_RXV, axis=-1) == batch.targets_RX
    counted_RX = batch.counted_RX
    return jnp.sum(jnp.where(counted_RX, chosen_RX, 0.0), axis=1), jnp.all(greedy_RX | ~counted_RX, axis=1)
