"""A teacher's distribution over the next token, on disk for every training token: its K largest probabilities.

    manifest.json          what the distributions were made of, their shape, and how many rows are done
    ids.npy                int32 [rows, T, K], token ids, most probable first
    log_probabilities.npy  float16 [rows, T, K], natural logarithms, at the temperature of the manifest

With K = 64 a token takes 384 bytes. Rows are those of the training split, in order. An unfinished store is continued.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from moe_reduce.core import disk
from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.batches import ArrayType, Batch
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.shards import TokenSource

FORMAT_VERSION = 1
MANIFEST_FILE, DONE = "manifest.json", "rows_done"
LARGEST = 64  # K
IDS, LOG_PROBABILITIES = "teacher_ids", "teacher_log_probabilities"  # names of the arrays in a batch
NAMES = {IDS: ("ids.npy", np.int32), LOG_PROBABILITIES: ("log_probabilities.npy", np.float16)}
WHAT = {
    "teacher": "another teacher", "corpus": "another text", "temperature": "another temperature",
    "sequence_length": "another sequence length", "document_mask": "another document mask",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Everything that decides the stored distributions, and their number."""

    teacher: str  # hash of the teacher, as a manifest names it
    corpus: str  # fingerprint of the text
    temperature: float
    sequence_length: int
    document_mask: bool
    rows: int  # sequences of the training split
    largest: int  # K
    format_version: int = FORMAT_VERSION


class TeacherLogits:
    """The store of one teacher and one text; arrays are memory-mapped."""

    def __init__(self, directory: Path, origin: Origin):
        """Open a store, or begin one. Raises UserError for one that is damaged or was made of anything else."""
        self.directory, self.origin = directory, origin
        self.done = self._rows_done()
        if self.done is None:
            self._begin()
        self._arrays = {name: self._map(file, kind) for name, (file, kind) in NAMES.items()}

    @property
    def complete(self) -> bool:
        """True once every row is there."""
        return self.done == self.origin.rows

    def write(self, first: int, arrays: Batch) -> None:
        """Write the rows from `first`; those beyond the last one are ignored. They count once they are on disk."""
        stop = min(self.origin.rows, first + len(next(iter(arrays.values()))))
        for name, stored in self._arrays.items():
            stored[first:stop] = arrays[name][: stop - first]
            stored.flush()
        self.done = stop
        self._write_manifest()

    def row(self, index: int) -> Batch:
        """Read one row: teacher_ids and teacher_log_probabilities, each [T, K]."""
        return {name: np.asarray(stored[index]) for name, stored in self._arrays.items()}

    def _rows_done(self) -> int | None:
        """Rows that an existing store holds; None where there is no store."""
        file = self.directory / MANIFEST_FILE
        if not file.exists():
            return None
        found = disk.read_json(file)
        for name, value in dataclasses.asdict(self.origin).items():
            if found.get(name) != value:
                made = f"of {WHAT[name]}" if name in WHAT else f"with another {name}"
                raise UserError(
                    f"{self.directory} holds a teacher's logits {made} ({name} {found.get(name)!r} there, {value!r} "
                    "here): name another directory, or remove it to make them anew"
                )
        done = found.get(DONE)
        if not isinstance(done, int) or not 0 <= done <= self.origin.rows:
            raise self._damaged(f"{DONE} is {done!r}")
        return done

    def _begin(self) -> None:
        with self.writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            if foreign := [entry.name for entry in self.directory.iterdir() if not self._is_ours(entry)]:
                raise UserError(f"{self.directory} holds {foreign[0]} and no teacher's logits: name another directory")
            for file, kind in NAMES.values():
                open_memmap(self.directory / file, mode="w+", dtype=kind, shape=self._shape()).flush()
            self.done = 0
            self._write_manifest()

    def _is_ours(self, entry: Path) -> bool:
        return entry.name.startswith(".") or entry.name in [file for file, _ in NAMES.values()]

    def _map(self, file: str, kind: Any) -> np.memmap:
        try:
            found = open_memmap(self.directory / file, mode="r" if self.complete else "r+")
        except (OSError, ValueError) as error:
            raise self._damaged(f"{file}: {error}") from error
        if found.shape != self._shape() or found.dtype != kind:
            raise self._damaged(f"{file} holds {found.dtype} {list(found.shape)}")
        return found

    def _shape(self) -> tuple[int, int, int]:
        return self.origin.rows, self.origin.sequence_length, self.origin.largest

    def _write_manifest(self) -> None:
        disk.write_json(self.directory / MANIFEST_FILE, dataclasses.asdict(self.origin) | {DONE: self.done})

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.directory} is damaged ({reason}): remove it to make the teacher's logits anew")

    def writing(self) -> Any:
        """Context that turns a full disk into a UserError."""
        return disk.writing(f"a teacher's logits to {self.directory}", "free space there, then run the command again")


class TaughtTokens:
    """A source of tokens whose training rows also have a teacher's stored distribution."""

    def __init__(self, source: TokenSource, stored: TeacherLogits):
        self.source, self._stored = source, stored

    @property
    def directory(self) -> Path | None:
        """Directory of the tokenizer's files."""
        return self.source.directory

    @property
    def end_of_text(self) -> int | None:
        """Id that follows each document."""
        return self.source.end_of_text

    def rows(self, split: str, sequence_length: int) -> int:
        """Number of whole rows in the split."""
        return self.source.rows(split, sequence_length)

    def row(self, split: str, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a row as the source does."""
        return self.source.row(split, index, sequence_length)

    def describe(self, split: str) -> str:
        """Size of the split, for messages."""
        return self.source.describe(split)

    def beside(self, split: str, index: int) -> Batch:
        """Read the arrays that an example has beside its tokens: the teacher's in training, else none."""
        return self._stored.row(index) if split == TRAIN else {}


def array_types(config: DataConfig, rows: int, largest: int) -> dict[str, ArrayType]:
    """Shapes and types of the teacher's arrays in a batch of `rows` sequences."""
    shape = (rows, config.sequence_length, largest)
    return {name: ArrayType(shape, np.dtype(kind)) for name, (_, kind) in NAMES.items()}
