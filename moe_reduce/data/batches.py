"""Batches of a prepared corpus through grain: shuffled, divided over processes, resumable at any step.

A batch is a dict of arrays with B sequences of T tokens, or with this process's shard of those sequences:

    tokens     int32 [B, T]
    targets    int32 [B, T], the next token
    weights    float32 [B, T], 1 where the target counts, else 0
    segments   int32 [B, T], number of the document within the row, from 1 (with data.document_mask only)
    positions  int32 [B, T], from 0 in each document (with data.document_mask only)

`array_types` says the same to code that needs the shapes of a batch and no data.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.pieces import TRAIN, VALIDATION
from moe_reduce.data.shards import SourceWithArrays, TokenSource

Batch = dict[str, np.ndarray]
EPOCHS = 1 << 31  # practically endless; grain's own endless repeat overflows in batches of one row
SAMPLES = 256  # sequences of each split that a fingerprint reads
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)  # reads of mapped files rarely wait


class ArrayType(NamedTuple):
    """Shape and type of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


def array_types(config: DataConfig, rows: int) -> dict[str, ArrayType]:
    """Shapes and types of a batch of `rows` sequences, by the names of its arrays."""
    integers = ("tokens", "targets", *(("segments", "positions") if config.document_mask else ()))
    dtypes = dict.fromkeys(integers, np.dtype(np.int32)) | {"weights": np.dtype(np.float32)}
    return {name: ArrayType((rows, config.sequence_length), dtype) for name, dtype in dtypes.items()}


class Examples:
    """Random access to the examples of one split, without a batch dimension, for grain."""

    def __init__(self, source: TokenSource, split: str, config: DataConfig):
        self._source, self._split = source, split
        self._length, self._document_mask = config.sequence_length, config.document_mask

    def __len__(self) -> int:
        """Number of whole sequences."""
        return self._source.rows(self._split, self._length)

    def __getitem__(self, index: int) -> Batch:
        """Read one example, with the arrays of a batch, each [T]."""
        row, counts = self._source.row(self._split, int(index), self._length)
        example = {"tokens": row[:-1], "targets": row[1:], "weights": counts}
        if self._document_mask:
            assert self._source.end_of_text is not None  # sources without documents refuse the mask
            example |= _document_arrays(row[:-1], self._source.end_of_text)
            example["weights"] = np.where(row[:-1] == self._source.end_of_text, np.float32(0), counts)
        if isinstance(self._source, SourceWithArrays):
            example |= self._source.beside(self._split, int(index))
        return example


def fingerprint(source: TokenSource, config: DataConfig) -> str:
    """SHA-256 of the tokens, which another text or another tokenizer changes.

    Covers the number of sequences and a sample spread over each split: reading all of a large corpus would take minutes
    at every start.
    """
    total = hashlib.sha256()
    for split in (TRAIN, VALIDATION):
        rows = source.rows(split, config.sequence_length)
        total.update(f"{split} {rows}\n".encode())
        count = min(rows, SAMPLES)
        for sample in range(count):
            row, counts = source.row(split, sample * rows // count, config.sequence_length)
            total.update(row.tobytes() + counts.tobytes())
    return total.hexdigest()


def train_batches(
    source: TokenSource, config: DataConfig, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
) -> grain.DatasetIterator:
    """Iterate endlessly over one shard of the rows of each training batch: batch_size / shard_count rows.

    Each epoch visits every sequence once, in its own order; a batch may hold the end of one epoch and the start of the
    next. Step s holds the same sequences whatever the number of shards. The iterator's get_state() is plain JSON, and
    set_state() continues bit for bit from there. Raises UserError when the corpus does not fill one batch.
    """
    examples = Examples(source, TRAIN, config)
    rows = _rows_per_shard(batch_size, shard_count)
    if len(examples) < batch_size:
        raise UserError(
            f"the corpus has {source.describe(TRAIN)} for training, {len(examples)} sequences of "
            f"{config.sequence_length}, fewer than train.batch_size={batch_size}: give more text, or lower "
            "train.batch_size or data.sequence_length"
        )
    # grain orders epoch e by seed + e: hash the seed, so that runs with neighbouring seeds share no order
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    sequences = grain.MapDataset.source(examples).shuffle(seed=spread_seed).repeat(EPOCHS)
    mine = sequences.slice(slice(shard_index, None, shard_count))
    return iter(mine.batch(rows).to_iter_dataset(READ_OPTIONS))


def validation_batches(
    source: TokenSource,
    config: DataConfig,
    batch_size: int,
    batches: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> list[Batch]:
    """Make at most `batches` batches of sequences spread evenly over the validation split, the same each time.

    No sequence repeats, except as filler rows of weight 0 in the last batch. Raises UserError when the split
    holds no whole sequence.
    """
    examples = Examples(source, VALIDATION, config)
    rows = _rows_per_shard(batch_size, shard_count)
    if len(examples) == 0:
        raise UserError(
            f"the corpus has {source.describe(VALIDATION)} for validation, less than one sequence of "
            f"{config.sequence_length}: give more text, {_raise_fraction(config)}or lower data.sequence_length"
        )
    count = min(len(examples), batch_size * batches)
    chosen = [number * len(examples) // count for number in range(count)]
    found = []
    for start in range(0, count, batch_size):
        mine = range(start + shard_index, start + shard_index + rows * shard_count, shard_count)
        found.append(_stack([_example_or_filler(examples, chosen, row) for row in mine]))
    return found


def _raise_fraction(config: DataConfig) -> str:
    if config.validation_source is not None or config.validation_fraction == 1.0:
        return ""
    return f"raise data.validation_fraction ({config.validation_fraction}) "


class WholeSplit:
    """Batches of every sequence of the training split, once and in order; filler rows in the last one have weight 0."""

    def __init__(self, source: TokenSource, config: DataConfig, batch_size: int):
        self._examples, self._rows = Examples(source, TRAIN, config), batch_size
        if len(self._examples) == 0:
            raise UserError(
                f"the corpus has {source.describe(TRAIN)}, less than one sequence of {config.sequence_length}: give "
                "more text or shorter sequences"
            )

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._examples) // self._rows)

    def __getitem__(self, index: int) -> Batch:
        """Read batch `index`."""
        chosen = range(len(self._examples))
        rows = range(index * self._rows, (index + 1) * self._rows)
        return _stack([_example_or_filler(self._examples, chosen, row) for row in rows])


def _example_or_filler(examples: Examples, chosen: Sequence[int], row: int) -> Batch:
    if row < len(chosen):
        return examples[chosen[row]]
    filler = examples[chosen[0]]
    return filler | {"weights": np.zeros_like(filler["weights"])}


def _stack(examples: list[Batch]) -> Batch:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _rows_per_shard(batch_size: int, shard_count: int) -> int:
    if batch_size % shard_count:
        raise UserError(f"train.batch_size ({batch_size}) must be a multiple of the number of hosts ({shard_count})")
    return batch_size // shard_count


def _document_arrays(tokens: np.ndarray, end_of_text: int) -> Batch:
    """Make `segments` and `positions` of one row, int32 [T]: a document starts after each end of text."""
    starts = np.concatenate([[True], tokens[:-1] == end_of_text])
    indices = np.arange(len(tokens), dtype=np.int32)
    segments = np.cumsum(starts, dtype=np.int32)
    return {"segments": segments, "positions": indices - np.maximum.accumulate(np.where(starts, indices, 0))}
