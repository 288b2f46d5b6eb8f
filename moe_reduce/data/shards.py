"""Token ids in memory-mapped files with a manifest.

    manifest.json        origin and number of the tokens, and the files of each split with their lengths
    train-00000.bin ...  little-endian uint16, or uint32 for vocabularies beyond 65,536

The manifest is written last. `prepare` writes to a temporary directory and renames it when the manifest is there.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np

from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError
from moe_reduce.data.pieces import SPLITS

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SHARD_TOKENS = 1 << 25


@dataclass(frozen=True)
class Shard:
    """One file of a split, and its length in tokens."""

    file: str
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """Origin and number of the tokens of a corpus; the id `end_of_text` follows each document.

    left_out: documents of the training text that the validation text holds as well.
    """

    format_version: int
    tokenizer_hash: str
    corpus_hash: str
    vocab_size: int
    dtype: str
    end_of_text: int
    documents: int
    tokens: int
    bytes_of_text: int
    splits: dict[str, list[Shard]]
    left_out: int = 0

    def save(self, directory: Path) -> None:
        """Write manifest.json."""
        (directory / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


class TokenSource(Protocol):
    """Source of rows of T + 1 consecutive tokens, from which batches are made."""

    @property
    def directory(self) -> Path | None:
        """Directory that holds the files of the tokens' tokenizer; None for a source that keeps none."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """Id that follows each document; None for a source without documents."""
        ...

    def rows(self, split: str, sequence_length: int) -> int:
        """Number of whole rows in the split."""
        ...

    def row(self, split: str, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a row: its tokens, int32 [T + 1], and its targets' weights, float32 [T]: 1 if it counts, else 0."""
        ...

    def describe(self, split: str) -> str:
        """Size of the split, for messages."""
        ...


@runtime_checkable
class SourceWithArrays(TokenSource, Protocol):
    """Source whose examples have arrays beside their tokens."""

    def beside(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Read the arrays of a row, [T, …] each, by their names in a batch."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of the ids on disk: uint16 if it holds every id, else uint32; both little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writer of the tokens of one split, to files of about `shard_tokens` each."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS):
        self._directory, self._split, self._dtype, self._limit = directory, split, dtype, shard_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._tokens = 0

    def append(self, ids: np.ndarray) -> None:
        """Append ids, any integer [tokens]; OSError when the disk is full."""
        if len(ids) == 0:
            return
        if self._file is None:
            self._file = (self._directory / self._name()).open("wb")
        self._file.write(ids.astype(self._dtype).tobytes())
        self._tokens += len(ids)
        if self._tokens >= self._limit:
            self.close()

    def close(self) -> list[Shard]:
        """End the current file and return all shards so far; `append` then starts the next file."""
        if self._file is not None:
            name = self._name()
            file, self._file = self._file, None
            file.close()
            self._shards.append(Shard(name, self._tokens))
            self._tokens = 0
        return self._shards

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.bin"


class TokenStore:
    """A prepared corpus: one long sequence of tokens per split, memory-mapped."""

    def __init__(self, directory: Path):
        """Raises UserError when the manifest or a shard is missing, damaged or cut short."""
        self.directory = directory
        self.manifest = _read_manifest(directory)
        self._shards = {split: [self._map(shard) for shard in shards] for split, shards in self.manifest.splits.items()}
        lengths = {split: [shard.tokens for shard in shards] for split, shards in self.manifest.splits.items()}
        self._ends = {split: np.cumsum(values, dtype=np.int64) for split, values in lengths.items()}

    @property
    def end_of_text(self) -> int:
        """Id that follows each document."""
        return self.manifest.end_of_text

    def length(self, split: str) -> int:
        """Number of tokens in "train" or "validation"."""
        return sum(shard.tokens for shard in self.manifest.splits[split])

    def window(self, split: str, start: int, length: int) -> np.ndarray:
        """Read `length` consecutive tokens from `start`, across shards, as int32 [length]."""
        if start < 0 or start + length > self.length(split):
            raise IndexError(f"tokens {start} to {start + length} of {self.length(split)} in {split}")
        found = np.empty(length, dtype=np.int32)
        done = 0
        number = int(np.searchsorted(self._ends[split], start, side="right"))
        while done < length:
            shard = self._shards[split][number]
            offset = start + done - (int(self._ends[split][number]) - len(shard))
            part = shard[offset : offset + length - done]
            found[done : done + len(part)] = part
            done += len(part)
            number += 1
        return found

    def rows(self, split: str, sequence_length: int) -> int:
        """Number of windows of T + 1 tokens that start every T tokens; every token but the first is a target once."""
        return max(0, (self.length(split) - 1) // sequence_length)

    def row(self, split: str, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read window `index`, int32 [T + 1]; every target counts, float32 [T]."""
        tokens = self.window(split, index * sequence_length, sequence_length + 1)
        return tokens, np.ones(sequence_length, dtype=np.float32)

    def describe(self, split: str) -> str:
        """Size of the split, for messages."""
        return f"{self.length(split):,} tokens"

    def _map(self, shard: Shard) -> np.ndarray:
        path = self.directory / shard.file
        dtype = np.dtype(self.manifest.dtype)
        expected = shard.tokens * dtype.itemsize
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise UserError(
                f"{path} is truncated: expected {expected} bytes, found {found}; delete {self.directory} and run again"
            )
        return np.memmap(path, dtype=dtype, mode="r")


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_FILE
    try:
        raw = json_files.read_object(path)
        listed = raw.pop("splits")
        splits = {split: [Shard(**shard) for shard in listed[split]] for split in SPLITS}
        manifest = Manifest(splits=splits, **raw)
        _check_types(manifest)
    except (OSError, UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is missing or damaged ({error!r}); delete {directory} and run again") from error
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {manifest.format_version}, this version reads {FORMAT_VERSION}; delete {directory}"
        )
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise ValueError unless every number is one that a corpus can have, and every file lies in the directory."""
    shards = [shard for split in manifest.splits.values() for shard in split]
    numbers = [getattr(manifest, field.name) for field in fields(Manifest) if field.type is int]
    if not all(type(number) is int and number >= 0 for number in [*numbers, *(shard.tokens for shard in shards)]):
        raise ValueError("a number is no count")
    if any(shard.file != Path(shard.file).name for shard in shards):
        raise ValueError("a shard is no file of this directory")
    if manifest.dtype not in ("<u2", "<u4"):
        raise ValueError(f"dtype {manifest.dtype!r} is unknown")
    if sum(shard.tokens for shard in shards) != manifest.tokens or manifest.end_of_text >= manifest.vocab_size:
        raise ValueError("its numbers contradict each other")
