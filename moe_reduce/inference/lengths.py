"""Padded lengths of rows: few enough that compiling stays cheap, close enough that little is computed for padding."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count

LEAST_BUCKET = 16
# arithmetic that takes as long as tracing a program and reading it from the compilation cache
PROGRAM_OPERATIONS = {"cpu": 3e10}
PROGRAM_OPERATIONS_ACCELERATOR = 3e14


def bucket(length: int, least: int = LEAST_BUCKET) -> int:
    """Smallest size, of 2^n and 1.5 · 2^n, that is at least the length and `least`."""
    power = max(least, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > least and length <= power * 3 // 4 else power


def program_cost(model: Model) -> float:
    """Tokens that the model could read in the time that one more program takes."""
    operations = PROGRAM_OPERATIONS.get(model.execution.platform, PROGRAM_OPERATIONS_ACCELERATOR)
    return operations / (2 * parameter_count(model.config))


def sizes(lengths: Iterable[int], program: float, least: int = LEAST_BUCKET) -> list[int]:
    """Buckets to pad rows of these lengths to, ascending, so that padding and programs cost least together.

    program: cost of one more size, in tokens.
    """
    counts = sorted(Counter(bucket(length, least) for length in lengths).items())
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # cost and sizes for the rows of the first n buckets
    for end, (size, _) in enumerate(counts, 1):
        best.append(
            min(
                (
                    best[start][0] + program + size * sum(count for _, count in counts[start:end]),
                    [*best[start][1], size],
                )
                for start in range(end)
            )
        )
    return best[-1][1]


def padded(length: int, available: list[int]) -> int:
    """The smallest of the sizes that holds the length."""
    return next(size for size in available if size >= length)


def batch_rows(count: int, most: int, length: int, program: float) -> int:
    """Rows to compute for `count` of them: `most`, unless the padding would cost more than a program of its own."""
    return most if (most - count) * length <= program else min(most, 1 << (count - 1).bit_length())


def padded_batch(config: ModelConfig, tokens_BT: jax.Array, lengths_B: jax.Array) -> dict[str, Any]:
    """A batch of rows that are padded on the right, to fill a cache with.

    Nothing attends to padding, but states of linear attention would read it: for these, `weights` mark the real tokens.
    """
    if config.linear is None:
        return {"tokens": tokens_BT}
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    return {"tokens": tokens_BT, "weights": real_BT.astype(jnp.float32)}
