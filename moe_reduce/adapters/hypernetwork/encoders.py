"""Text encoders: descriptions -> embeddings, computed once and cached on disk.

An encoder is frozen: it never trains with the hypernetwork. `one_hot` is the control without text: it tells tasks apart
by their names and cannot describe a new one. Both together are two embeddings side by side.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moe_reduce.adapters.hypernetwork.sentence_transformer import SentenceTransformer
from moe_reduce.core.errors import UserError


class Encoder(Protocol):
    """A frozen function from texts to embeddings of one width."""

    @property
    def name(self) -> str:
        """Name by which the configuration gives it."""
        ...

    @property
    def width(self) -> int:
        """Width W of an embedding."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides an embedding."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, fp32 [n, W]."""
        ...


class OneHot:
    """Names of known tasks -> unit vectors."""

    name = "one-hot"

    def __init__(self, names: Sequence[str]):
        self._numbers = {name: number for number, name in enumerate(names)}
        self.width = len(self._numbers)
        self.hash = hashlib.sha256("\n".join(self._numbers).encode()).hexdigest()

    def __contains__(self, name: str) -> bool:
        """True for the name of a known task."""
        return name in self._numbers

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, fp32 [n, W]. Raises UserError for a name that is not among the known tasks."""
        unknown = [text for text in texts if text not in self._numbers]
        if unknown:
            raise UserError(f"one-hot conditioning knows no task {unknown[0]!r}: describe it to a text encoder instead")
        return np.eye(self.width, dtype=np.float32)[[self._numbers[text] for text in texts]]


class Cached:
    """An encoder whose embeddings are kept in a directory, one file a text, and computed once."""

    def __init__(self, encoder: Encoder, directory: Path):
        self._encoder = encoder
        self._directory = directory / encoder.hash[:16]
        self.name, self.width, self.hash = encoder.name, encoder.width, encoder.hash

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, fp32 [n, W]. Raises UserError for an empty text."""
        check_texts(texts)
        files = {text: self._file(text) for text in texts}
        new = [text for text, file in files.items() if not file.is_file()]
        known = dict(zip(new, self._encoder.encode(new), strict=True)) if new else {}
        for text, embedding in known.items():
            _write(files[text], embedding)
        return np.stack([known[text] if text in known else np.load(files[text]) for text in texts])

    def _file(self, text: str) -> Path:
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._directory / digest[:2] / f"{digest}.npy"


def open_encoder(name: str, cache: Path) -> Encoder:
    """The text encoder of this name (see `SentenceTransformer`), with its embeddings cached below a directory."""
    return Cached(SentenceTransformer(name), cache)


def check_texts(texts: Sequence[str]) -> None:
    """Raise UserError unless there are texts, and each says something."""
    if not texts:
        raise UserError("no description was given: say in a sentence what the task is")
    for number, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"description {number + 1} is empty: say in a sentence what the task is")


def _write(file: Path, embedding: np.ndarray) -> None:
    """Write a file atomically, since other processes may write the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.npy")
    np.save(temporary, embedding)
    os.replace(temporary, file)
