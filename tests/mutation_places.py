"""Places in a file that a mutation changed, by the names of its format, so that a silent difference can be judged."""

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import zstandard

UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".zst": zstandard.decompress}


def places(name: str, before: bytes, after: bytes) -> list[str]:
    """Places by which two contents of a file differ: keys of JSON (* for a number in a list), parts of a format."""
    suffix = Path(name).suffix
    if suffix in UNPACK:
        try:
            before, after = UNPACK[suffix](before), UNPACK[suffix](after)
        except Exception:
            return ["compressed bytes"]
        suffix = Path(Path(name).stem).suffix
    if before == after:
        return []
    finder = FINDERS.get(suffix)
    try:
        return ["bytes"] if finder is None else sorted(set(finder(before, after)))
    except (ValueError, KeyError, IndexError, RecursionError):
        return ["bytes"]


def _json(before: bytes, after: bytes) -> Iterator[str]:
    return _differences(json.loads(before), json.loads(after), "")


def _differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {*one, *other}:
            place = f"{path}.{key}" if path else key
            if key not in other:
                yield f"{place} (gone)"
            elif key not in one:
                yield f"{place} (new)"
            else:
                yield from _differences(one[key], other[key], place)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for left, right in zip(one, other, strict=True):
            yield from _differences(left, right, f"{path}.*")
    elif repr(one) != repr(other):
        yield path or "whole"


def _lines(before: bytes, after: bytes) -> Iterator[str]:
    one, other = before.splitlines(), after.splitlines()
    if len(one) != len(other):
        yield "number of lines"
    for left, right in zip(one, other, strict=False):
        if left != right:
            yield from (f"line.{place}" for place in _json(left, right))


def _safetensors(before: bytes, after: bytes) -> Iterator[str]:
    (one, data), (other, values) = _header(before), _header(after)
    yield from (f"header.{place}" for place in _json(one, other))
    if data != values:
        yield "data"


def _header(content: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(content[:8], "little")
    return content[8 : 8 + size], content[8 + size :]


def _npy(before: bytes, after: bytes) -> Iterator[str]:
    size = 10 + int.from_bytes(before[8:10], "little")
    if before[:size] != after[:size]:
        yield "header"
    if before[size:] != after[size:]:
        yield "data"


def _gguf(before: bytes, after: bytes) -> Iterator[str]:
    if len(before) != len(after):
        yield "length"
    size = min(len(before), len(after))
    changed = np.flatnonzero(np.frombuffer(before, np.uint8, size) != np.frombuffer(after, np.uint8, size))
    for name, start, stop in gguf_regions(before):
        if np.searchsorted(changed, start) < np.searchsorted(changed, stop):
            yield name


def gguf_regions(content: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of every part of a GGUF file: of its fields, its table of tensors and their values."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        reader = gguf.GGUFReader(file.name)
    base = reader.data.ctypes.data
    for name, field in reader.fields.items():
        for part in field.parts:
            start = part.ctypes.data - base
            yield name, start, start + part.nbytes
    for tensor in reader.tensors:
        for part in tensor.field.parts:
            start = part.ctypes.data - base
            yield f"table of {tensor.name}", start, start + part.nbytes
        yield f"values of {tensor.name}", tensor.data_offset, tensor.data_offset + tensor.n_bytes


FINDERS: dict[str, Callable[[bytes, bytes], Iterator[str]]] = {
    ".json": _json, ".jsonl": _lines, ".safetensors": _safetensors, ".npy": _npy, ".gguf": _gguf,
}  # fmt: skip
