"""GGUF, the file format of llama.cpp: metadata and tensors of one model in one file, read by the library `gguf`.

Tokenizing processes import this module: keep it free of JAX.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_reduce.core.errors import UserError

SUFFIX = ".gguf"
ARCHITECTURE = "general.architecture"
PARTS = "split.count"
SHOWN = 160  # characters of an error of the library
LONGEST = 1 << 24  # values of a list in the metadata: vocabularies have less than a million tokens


class StoredTensor(NamedTuple):
    """One tensor of a file. Its last axis is that along which values are quantised in blocks.

    kind: the library's GGMLQuantizationType. data: memory-mapped; values, or rows of bytes that hold blocks.
    """

    kind: Any
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class GgufFile:
    """Content of a file; the bytes of its tensors are read when they are used."""

    path: Path
    metadata: Mapping[str, Any]  # strings, numbers and lists of them
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: str | Path) -> bool:
    """Tell by its name whether a path is a GGUF file."""
    return Path(path).suffix.lower() == SUFFIX


def read_gguf(path: str | Path) -> GgufFile:
    """Read metadata and the table of tensors; UserError when the file is missing, damaged or a part of several."""
    path = Path(path)
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a GGUF file or a model directory") from None
    found = _read(path, state.st_mtime_ns, state.st_size)
    if found.metadata.get(PARTS, 1) not in (0, 1):
        raise UserError(f"{path} is one of {found.metadata[PARTS]} parts: join them with llama-gguf-split --merge")
    return found


@functools.lru_cache(maxsize=2)  # a model and its baseline; a vocabulary takes a second to read
def _read(path: Path, modified: int, size: int) -> GgufFile:  # noqa: ARG001  tells when the file has changed
    try:
        reader = _reader(path)
        metadata = {name: _value(field) for name, field in reader.fields.items()}
        tensors = {
            tensor.name: StoredTensor(tensor.tensor_type, tuple(map(int, reversed(tensor.shape))), tensor.data)
            for tensor in reader.tensors
        }
        _check_end(reader, size)
    except Exception as error:  # the library checks little: a damaged file makes it raise many types
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        raise UserError(f"{path} is not a whole GGUF file ({reason}): fetch it again") from error
    return GgufFile(path, metadata, tensors)


def _check_end(reader: Any, size: int) -> None:
    """Raise ValueError for bytes behind the last tensor: where some were inserted, tensors hold others' values."""
    end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=size)
    padding = -end % int(reader.alignment)
    if size > end + padding:
        raise ValueError(f"{size - end} bytes follow its last tensor")


def _reader(path: Path) -> Any:
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """The library's reader, which stops at the end of the file, and at a list that no model has.

        It reads from a plain array: slices of a numpy.memmap take three times as long and as much.
        """

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise ValueError(f"it ends within the value at byte {offset}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > LONGEST:
                raise ValueError(f"the list at byte {orig_offs} has no end")
            return super()._get_field_parts(orig_offs, raw_type)

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = np.asarray(mapped)

    return Reader(path)


def _value(field: Any) -> Any:
    """Value of a field; a 32-bit number becomes the shortest decimal that stands for it, as it was before."""
    from gguf import GGUFValueType

    value = field.contents()
    return float(str(np.float32(value))) if field.types == [GGUFValueType.FLOAT32] else value
