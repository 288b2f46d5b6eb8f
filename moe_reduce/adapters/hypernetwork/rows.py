"""Instances of described tasks as token rows, and batches in which the tasks take turns.

A batch is that of data/batches.py, with two more arrays:

    task       int32 [B], index of the row's task
    embedding  float32 [B, W], embedding of one of its descriptions
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import grain
import numpy as np

from moe_reduce.adapters.hypernetwork.tasks import DescribedTask, pairs
from moe_reduce.core.errors import UserError
from moe_reduce.data.batches import READ_OPTIONS, Batch
from moe_reduce.data.tokenizers import Tokenizer

ENDLESS = 1 << 40  # examples, practically endless


@dataclass(frozen=True, eq=False)
class TaskRows:
    """Rows of one task; `embeddings` are those of its descriptions."""

    name: str
    tokens_XT: np.ndarray  # int32, inputs
    targets_XT: np.ndarray  # int32
    weights_XT: np.ndarray  # float32, 1 for targets of the completion and its end of text
    embeddings_KW: np.ndarray  # float32

    def example(self, index: int, task: int, description: int) -> Batch:
        """Arrays of one row, without the batch axis."""
        return {
            "tokens": self.tokens_XT[index],
            "targets": self.targets_XT[index],
            "weights": self.weights_XT[index],
            "task": np.asarray(task, np.int32),
            "embedding": self.embeddings_KW[description % len(self.embeddings_KW)],
        }


def short(task: DescribedTask, tokenizer: Tokenizer, sequence_length: int) -> DescribedTask:
    """The task with those instances whose rows have at most `sequence_length` targets; possibly none."""
    lengths = [len(_row(*text, tokenizer)[0]) - 1 for text in pairs(task)]
    kept = zip(task.instances, lengths, strict=True)
    return replace(task, instances=tuple(one for one, length in kept if length <= sequence_length))


def encode(
    task: DescribedTask,
    tokenizer: Tokenizer,
    sequence_length: int,
    embeddings_KW: np.ndarray,
    texts: Sequence[tuple[str, str]] | None = None,
) -> TaskRows:
    """Rows of a task's instances, none of which is longer than `sequence_length` targets (see `short`).

    texts: (prompt, completion) of each instance; None for prompts without the description, as adapters see them.
    """
    rows = [_row(*text, tokenizer) for text in texts or pairs(task)]
    ids_XT = np.full((len(rows), sequence_length + 1), tokenizer.end_of_text, np.int32)
    weights_XT = np.zeros((len(rows), sequence_length), np.float32)
    for number, (ids, length) in enumerate(rows):
        ids_XT[number, : len(ids)] = ids
        weights_XT[number, length - 1 : len(ids) - 1] = 1
    return TaskRows(task.name, ids_XT[:, :-1], ids_XT[:, 1:], weights_XT, embeddings_KW)


def _row(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    ids, length = tokenizer.encode_pair(prompt, completion)
    return [*ids, tokenizer.end_of_text], length


class Turns:
    """Endless examples: `groups` tasks a batch, each with `rows_per_task` instances and their descriptions.

    Tasks take turns: each comes once before any comes again, in an order that is drawn anew for every turn; so do the
    instances of a task. Example i depends on i and the seed alone.
    """

    def __init__(self, tasks: Sequence[TaskRows], rows_per_task: int, seed: int):
        self._tasks, self._rows, self._seed = tasks, rows_per_task, seed
        self._order = lru_cache(maxsize=4 * len(tasks))(self._permutation)

    def __len__(self) -> int:
        """Number of examples."""
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        """Read one example."""
        group, row = divmod(int(index), self._rows)
        turn, place = divmod(group, len(self._tasks))
        number = int(self._order(0, turn, len(self._tasks))[place])
        task = self._tasks[number]
        epoch, instance = divmod(turn * self._rows + row, len(task.tokens_XT))
        chosen = int(self._order(1 + number, epoch, len(task.tokens_XT))[instance])
        return task.example(chosen, number, int(self._random(-1, index).integers(1 << 31)))

    def _permutation(self, stream: int, epoch: int, size: int) -> np.ndarray:
        return self._random(stream, epoch).permutation(size)

    def _random(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, stream + 1, number])


def training_batches(
    tasks: Sequence[TaskRows], batch_size: int, rows_per_task: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> grain.DatasetIterator:
    """Iterate endlessly over one shard (index, number of shards) of the rows of each training batch; resumable."""
    index, count = shard
    if batch_size % count:
        raise UserError(f"train.batch_size ({batch_size}) must be a multiple of the number of hosts ({count})")
    examples = grain.MapDataset.source(Turns(tasks, rows_per_task, seed))  # type: ignore[arg-type]
    mine = examples.slice(slice(index, None, count))
    return iter(mine.batch(batch_size // count).to_iter_dataset(READ_OPTIONS))


def validation_batches(
    tasks: Sequence[TaskRows], batch_size: int, rows_of_each: int, shard: tuple[int, int] = (0, 1)
) -> list[Batch]:
    """The first rows of each task, in batches; filler rows in the last one have weight 0.

    Row x has the description x, counted around.
    """
    index, count = shard
    rows = [
        task.example(row, number, row)
        for number, task in enumerate(tasks)
        for row in range(min(rows_of_each, len(task.tokens_XT)))
    ]
    filler = rows[0] | {"weights": np.zeros_like(rows[0]["weights"])}
    rows += [filler] * (-len(rows) % batch_size)
    return [
        {name: np.stack([row[name] for row in rows[start + index : start + batch_size : count]]) for name in rows[0]}
        for start in range(0, len(rows), batch_size)
    ]


def fingerprint(tasks: Sequence[TaskRows]) -> str:
    """SHA-256 of all rows and embeddings."""
    total = hashlib.sha256()
    for task in tasks:
        total.update(task.name.encode())
        for array in (task.tokens_XT, task.weights_XT, task.embeddings_KW):
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
