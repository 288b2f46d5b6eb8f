"""Safetensors files, read lazily and written as a stream.

Opening reads only the headers; data stay on disk behind a memory map until a slice is copied. Writing holds one tensor
of each open file in memory, so a model may be larger than memory. The format is 8 bytes of little-endian header length,
a JSON header `{name: {dtype, shape, data_offsets}}`, then the data (https://huggingface.co/docs/safetensors). This is
our own code because the safetensors library cannot read bfloat16 into numpy.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from moe_reduce.core import hub, json_files
from moe_reduce.core.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 * 1000**3  # largest size of one file
WRITERS = 2  # files written at the same time: hashing a stream is slower than writing it
ALIGNMENT = 8  # bytes; the format pads headers so that data can be mapped in place
HEADER_LIMIT = 100_000_000  # bytes; the limit that the format sets

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Dtypes of the format that no weight of ours has: complex numbers, block scales, and values of less than a byte.
UNREAD_DTYPES = {"C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
LARGEST_TENSOR = 2**62  # bytes

COPY_BYTES = 4 * 1024**2  # buffer size for copying a tensor from file to file


@dataclass(frozen=True)
class Entry:
    """Location of one tensor: `start` and `stop` count bytes from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    stop: int

    def rows(self, numbers: Sequence[int]) -> tuple["Entry", ...]:
        """Locations of some slices along the first axis."""
        size = (self.stop - self.start) // self.shape[0]
        starts = [self.start + number * size for number in numbers]
        return tuple(Entry(self.file, self.shape[1:], self.dtype, start, start + size) for start in starts)


# location in another file to copy from, several that follow each other, or a function that returns an array
Source = Entry | tuple[Entry, ...] | Callable[[], np.ndarray]
TensorItem = tuple[str, tuple[int, ...], np.dtype, np.ndarray | Source]  # name, shape, dtype, data


class Tensors(Protocol):
    """The tensors of a model by name; their data are read on demand.

    directory: where they are, for messages. quantisation: what config.json says about quantised weights.
    """

    directory: Path
    entries: dict[str, Entry]
    quantisation: Mapping[str, Any]

    def read(self, name: str) -> np.ndarray:
        """Values of the tensor, possibly read-only."""
        ...

    def read_whole(self, name: str) -> np.ndarray:
        """A copy of the values."""
        ...

    def source(self, name: str) -> Source:
        """The tensor as data to write to another file."""
        ...


class TensorFiles:
    """The tensors of a model directory by name; their data are read on demand.

    Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names. An index beside a single file is
    ignored, as by transformers, unless shards that it names exist too. single: name of the one file to open instead,
    such as an adapter's. Raises UserError when a file is missing, truncated or corrupt, when index and shards
    disagree, or for a tensor of a dtype that this program does not read.
    """

    def __init__(self, directory: Path, single: str = SINGLE_FILE):
        self.directory = directory
        self.quantisation: Mapping[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self._maps: dict[Path, np.memmap] = {}
        file, index = directory / single, directory / INDEX_FILE
        if not hub.fetch(file) and single == SINGLE_FILE:
            hub.fetch(index)
        if single == SINGLE_FILE and file.exists() and index.exists():
            shards = sorted(set(_weight_map(index).values()) - {single})
            if any((directory / name).exists() for name in shards):
                raise UserError(
                    f"{directory} holds {SINGLE_FILE}, and {INDEX_FILE} with {', '.join(shards)}: remove the stale ones"
                )
        if file.exists():
            self.entries = _read_header(file)
        elif single != SINGLE_FILE:
            raise UserError(f"{directory} has no {single}: fetch it again")
        elif index.exists():
            self._open_shards(index)
        else:
            raise UserError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}: give a model directory in safetensors format"
            )

    def _open_shards(self, index: Path) -> None:
        weight_map = _weight_map(index)
        for name in sorted(set(weight_map.values())):
            file = self.directory / name
            hub.fetch(file)
            if not file.is_file():
                raise UserError(f"{index} names {name}, which is missing: fetch that file again")
            for tensor, entry in _read_header(file).items():
                if tensor in self.entries:
                    other = self.entries[tensor].file.name
                    raise UserError(f"tensor {tensor} is in {other} and in {name} of {self.directory}: remove one")
                self.entries[tensor] = entry
        for tensor, name in weight_map.items():
            if tensor not in self.entries or self.entries[tensor].file.name != name:
                raise UserError(f"{index} places tensor {tensor} in {name}, which does not hold it: fetch it again")

    def read(self, name: str) -> np.ndarray:
        """A read-only memory-mapped view of the tensor; bytes are read from disk when they are used."""
        entry = self.entries[name]
        if entry.start == entry.stop:
            return np.empty(entry.shape, entry.dtype)
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        data = np.asarray(self._maps[entry.file])[entry.start : entry.stop]
        return data.view(entry.dtype).reshape(entry.shape)

    def read_whole(self, name: str) -> np.ndarray:
        """A copy of the tensor, read without a memory map, whose pages would count as this process's memory."""
        entry = self.entries[name]
        count = (entry.stop - entry.start) // entry.dtype.itemsize
        return np.fromfile(entry.file, entry.dtype, count, offset=entry.start).reshape(entry.shape)

    def source(self, name: str) -> Source:
        """Location of the tensor, from which it is copied."""
        return self.entries[name]


def _weight_map(index: Path) -> dict[str, str]:
    """File name by tensor. UserError for an index that is damaged, or names a file outside its directory."""
    content = json_files.parse(index.read_bytes(), index, unique_keys=True)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{index} has no weight_map, which an index of safetensors needs: fetch it again")
    for tensor, name in found.items():
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{index} places tensor {tensor} in {name!r}, which is no file beside it: fetch it again")
    return found


def _read_header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise UserError(f"{file} is not a file: fetch it again")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > HEADER_LIMIT:
            raise UserError(f"{file} is not a safetensors file (no valid header length): fetch it again")
        text = stream.read(length)
    if len(text) < length:
        raise UserError(f"{file} is truncated within its header: fetch it again")
    header = json_files.parse(text, f"the corrupt header of {file}", unique_keys=True)
    try:
        described = {name: value for name, value in header.items() if name != "__metadata__"}
        entries = {name: _entry(file, 8 + length, name, value) for name, value in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} has a corrupt header ({error!r}): fetch it again") from None
    _check_extent(file, entries, 8 + length, size)
    return entries


def _entry(file: Path, base: int, name: str, described: dict[str, Any]) -> Entry:
    start, stop = described["data_offsets"]
    shape, code = tuple(described["shape"]), described["dtype"]
    if code in UNREAD_DTYPES:
        raise UserError(
            f"tensor {name} in {file} is of dtype {code}, which is not supported: convert it to BF16, F16 or F32"
        )
    if code not in DTYPES:
        raise ValueError(f"tensor {name} is of dtype {code!r}, which is unknown")
    dtype = DTYPES[code]
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"shape {shape} and offsets {start}-{stop} of tensor {name} must be whole numbers")
    # numpy multiplies the sizes of an empty tensor too
    if math.prod(max(number, 1) for number in shape) > LARGEST_TENSOR // dtype.itemsize:
        raise ValueError(f"shape {shape} of tensor {name} is too large")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {start}-{stop} do not hold shape {shape} of {dtype}")
    return Entry(file, shape, dtype, base + start, base + stop)


def _check_extent(file: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            raise UserError(
                f"{file} is truncated: tensor {name} ends at byte {entry.stop}, the file has {size}: fetch it again"
            )
        if entry.start != position:
            raise UserError(f"{file} has a corrupt header: tensor {name} overlaps or leaves a gap: fetch it again")
        position = entry.stop
    if position != size:
        raise UserError(f"{file} has {size} bytes, its header describes {position}: fetch it again")


def write_tensors(directory: Path, items: Iterable[TensorItem], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write tensors as one file, or as shards with an index; return the SHA-256 of each file by name.

    Shards are filled in the order of `items` up to `shard_bytes`, and WRITERS shards are written at the same time, each
    in a thread. A function among the data is called just before its tensor is written, and its result is dropped
    afterwards. Tensors in other files are copied a few megabytes at a time.
    """
    shards = _split(list(items), shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: write_file(directory / SINGLE_FILE, shards[0])}
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(WRITERS) as writers:  # after a failure, map starts no further file
        hashes = dict(zip(files, writers.map(write_file, [directory / file for file in files], shards), strict=True))
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, *_ in shard}
    everything = [item for shard in shards for item in shard]
    metadata = {
        "total_parameters": sum(math.prod(shape) for _, shape, _, _ in everything),
        "total_size": sum(_bytes(item) for item in everything),
    }
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    (directory / INDEX_FILE).write_text(content)
    return hashes | {INDEX_FILE: hashlib.sha256(content.encode()).hexdigest()}


def _bytes(item: TensorItem) -> int:
    return math.prod(item[1]) * item[2].itemsize


def _split(items: Sequence[TensorItem], shard_bytes: int) -> list[list[TensorItem]]:
    shards: list[list[TensorItem]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + _bytes(item) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += _bytes(item)
    return shards


def write_file(file: Path, items: Sequence[TensorItem]) -> str:
    """Write tensors as one file; return its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Wide types come first, so that every tensor is aligned to its item size, as in the safetensors library.
    ordered = sorted(items, key=lambda item: (-item[2].itemsize, item[0]))
    for item in ordered:
        name, shape, dtype, _ = item
        stop = position + _bytes(item)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(file, "wb") as stream, ThreadPoolExecutor(1) as hasher:
        hashed = _Hashed(stream, hasher)
        for data in (len(text).to_bytes(8, "little"), text):
            hashed.write(data)
        for item in ordered:
            _write_tensor(hashed, item)
        return hashed.hexdigest()


class _Hashed:
    """A stream whose bytes are hashed in a thread while they are written; hashing takes as long as writing."""

    def __init__(self, stream: BinaryIO, hasher: ThreadPoolExecutor):
        self._stream, self._hasher = stream, hasher
        self._digest, self._hashing = hashlib.sha256(), hasher.submit(lambda: None)
        self._buffers = itertools.cycle([memoryview(bytearray(COPY_BYTES)) for _ in range(2)])

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash bytes, which must not change before the next call."""
        self._hashing.result()  # the previous buffer is hashed, and free again
        self._hashing = self._hasher.submit(self._digest.update, data)
        self._stream.write(data)

    def copy(self, entry: Entry) -> None:
        """Copy a tensor from another file through buffers; pages of a memory map would count as our memory."""
        with open(entry.file, "rb", buffering=0) as source:
            source.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                buffer = next(self._buffers)[:left]
                count = source.readinto(buffer)
                if not count:
                    raise UserError(f"{entry.file} ended while it was copied: fetch it again")
                self.write(buffer[:count])
                left -= count

    def wait(self) -> None:
        """Wait until everything written is hashed and its buffers are released."""
        self._hashing.result()

    def hexdigest(self) -> str:
        """SHA-256 of everything written."""
        self.wait()
        return self._digest.hexdigest()


def _write_tensor(hashed: _Hashed, item: TensorItem) -> None:
    """Write one tensor; a separate function, so that its array is freed before the next one is made."""
    name, shape, dtype, source = item
    if isinstance(source, Entry):
        if (source.shape, source.dtype) != (shape, dtype):
            raise ValueError(f"tensor {name} was announced as {shape} {dtype}, got {source.shape} {source.dtype}")
        hashed.copy(source)
        return
    if isinstance(source, tuple):
        found = sum(piece.stop - piece.start for piece in source)
        if found != _bytes(item):
            raise ValueError(f"tensor {name} was announced as {shape} {dtype}, got pieces of {found} bytes")
        for piece in source:
            hashed.copy(piece)
        return
    array = source() if callable(source) else source
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"tensor {name} was announced as {shape} {dtype}, got {array.shape} {array.dtype}")
    hashed.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    hashed.wait()
