"""Readers of local corpus files: txt, jsonl and parquet, compressed or not.

Tokenizing processes import this module: keep it free of JAX.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError
from moe_reduce.data.text_files import MARK, open_text

READ_CHARACTERS = 1 << 16
PARQUET_ROWS = 256
UNREADABLE = (OSError, EOFError, UnicodeError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, MemoryError)


def read_documents(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    """Read the documents of one file, each as consecutive fragments of its text.

    A text file is one document; every jsonl line and parquet row is one document, in `text_field`. Raises UserError for
    an unknown kind of file, an unreadable file and a missing field.
    """
    reader = READERS[_suffix(path)]
    try:
        yield from reader(path, text_field)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def is_known(path: Path) -> bool:
    """Tell whether the file's name ends in a suffix that `read_documents` knows."""
    return path.name.lower().endswith(tuple(READERS))


def has_fields(path: Path) -> bool:
    """Tell whether the file's documents are rows with fields rather than plain text."""
    rows = tuple(suffix for suffix, reader in READERS.items() if reader is not _read_text)
    return path.name.lower().endswith(rows)


def text_of(row: dict[str, Any], text_field: str, location: str) -> str:
    """Return row[text_field]; UserError names the location (file and line) and the fields that exist."""
    if text_field not in row:
        raise UserError(
            f"{location} has no field {text_field!r}, only {', '.join(row) or 'none'}: name one of them "
            "(data.text_field, --text-field)"
        )
    if not isinstance(row[text_field], str):
        raise UserError(f"{location}: field {text_field!r} holds {type(row[text_field]).__name__}, not text")
    text: str = row[text_field]
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express and no tokenizer accepts
        text = text.encode(errors="replace").decode()
    return text


def _suffix(path: Path) -> str:
    for suffix in READERS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise UserError(f"{path} is none of {', '.join(READERS)}: convert it, or make the glob narrower")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(f"cannot read {path} ({reason}): is it cut short, or not what its name says?")


def _read_text(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    del text_field
    yield _text_fragments(path)


def _text_fragments(path: Path) -> Iterator[str]:
    try:
        with open_text(path) as file:
            while fragment := file.read(READ_CHARACTERS):
                yield fragment
    except UNREADABLE as error:  # fragments are read after read_documents has yielded them
        raise _unreadable(path, error) from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(MARK)  # files that were joined may each have one
            if line.strip():
                yield (text_of(_parse_line(line, f"{path}:{number}"), text_field, f"{path}:{number}"),)


def _parse_line(line: str, location: str) -> dict[str, Any]:
    row = json_files.parse(line, location, "is the file cut short?")
    if not isinstance(row, dict):
        raise UserError(f"{location} holds {type(row).__name__}, not an object with a text field")
    return row


def _read_parquet(path: Path, text_field: str) -> Iterator[Iterable[str]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            text_of(dict.fromkeys(names), text_field, str(path))
        row = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield (text_of({text_field: value}, text_field, f"{path}, row {row}"),)


READERS: dict[str, Callable[[Path, str], Iterator[Iterable[str]]]] = {
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}
