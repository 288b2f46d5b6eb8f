"""Leaks between tasks: a common source, or instances that are nearly the same text.

Instances are compared by hashes of their runs of NGRAM words. An instance of one task is a near duplicate if at least
half of its runs are in another task; two tasks leak if that holds for a share of the instances of either.
"""

import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_reduce.adapters.hypernetwork.tasks import DescribedTask

NGRAM = 8  # words
SHORTEST = 4  # words of an instance that is compared; shorter ones are equal by chance
DUPLICATE = 0.5  # share of an instance's runs that another task has, from which on it is a near duplicate
TOLERATED = 0.01  # share of a task's compared instances that may be near duplicates
MULTIPLIER = np.uint64(6364136223846793005)
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Leak:
    """Two tasks that must not stand on two sides of a split, and why."""

    left: str
    right: str
    reason: str


@dataclass(frozen=True)
class _Runs:
    """Hashes of all runs of a task, uint64, by instance: those of instance i begin at starts[i]."""

    hashes: np.ndarray
    starts: np.ndarray
    unique: np.ndarray  # ascending


def leaks(tasks: Sequence[DescribedTask]) -> list[Leak]:
    """Every leak between two of the tasks."""
    found = []
    runs = [_runs(task) for task in tasks]
    near = _overlapping(runs)
    for left, right in itertools.combinations(range(len(tasks)), 2):
        common = _sources(tasks[left]) & _sources(tasks[right])
        if common:
            found.append(Leak(tasks[left].name, tasks[right].name, f"both have the source {min(common)}"))
        elif (left, right) in near:
            shares = _duplicated(runs[left], runs[right]), _duplicated(runs[right], runs[left])
            if max(shares) > TOLERATED:
                reason = f"{max(shares):.0%} of the instances of one are nearly in the other"
                found.append(Leak(tasks[left].name, tasks[right].name, reason))
    return found


def _sources(task: DescribedTask) -> set[str]:
    """Sources of a task in one spelling: without punctuation and what stands in brackets."""
    return {"".join(WORD.findall(source.lower().partition("(")[0])).replace("_", "") for source in task.sources} - {""}


def _runs(task: DescribedTask) -> _Runs:
    hashes, lengths = [], []
    for instance in task.instances:
        words = WORD.findall(instance.text.lower())
        if len(words) >= SHORTEST:
            hashes.append(_hashes(words))
            lengths.append(len(hashes[-1]))
    if not hashes:
        nothing = np.zeros(0, np.uint64)
        return _Runs(nothing, np.zeros(0, np.int64), nothing)
    joined = np.concatenate(hashes)
    return _Runs(joined, np.cumsum([0, *lengths[:-1]]), np.unique(joined))


def _hashes(words: Sequence[str]) -> np.ndarray:
    """Hash of every run of NGRAM words, uint64; of all words where there are fewer."""
    values = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    count = max(1, len(values) - NGRAM + 1)
    total = np.zeros(count, np.uint64)
    for offset in range(min(NGRAM, len(values))):
        total = total * MULTIPLIER + values[offset : offset + count] + np.uint64(1)  # modulo 2^64
    return total


def _overlapping(runs: Sequence[_Runs]) -> set[tuple[int, int]]:
    """Pairs of tasks that have a run in common, found by one sort of all runs."""
    hashes = np.concatenate([task.unique for task in runs])
    owners = np.repeat(np.arange(len(runs)), [len(task.unique) for task in runs])
    order = np.argsort(hashes, kind="stable")  # within a hash, owners ascend
    owners = owners[order]
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    found: set[tuple[int, int]] = set()
    for index in np.flatnonzero(counts > 1):
        group = owners[starts[index] : starts[index] + counts[index]]
        found.update(itertools.combinations(group.tolist(), 2))
    return found


def _duplicated(runs: _Runs, other: _Runs) -> float:
    """Share of a task's compared instances that are near duplicates of the other's."""
    if not len(runs.starts) or not len(other.unique):
        return 0.0
    present = np.isin(runs.hashes, other.unique).astype(np.float64)
    lengths = np.diff([*runs.starts, len(runs.hashes)])
    return float(np.mean(np.add.reduceat(present, runs.starts) / lengths >= DUPLICATE))
