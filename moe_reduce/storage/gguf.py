"""Weights of a GGUF file under the names and layouts of a model directory, by default dequantised as they are read."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_reduce import families
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import GgufFile, StoredTensor, read_gguf
from moe_reduce.core.schemes import Scheme
from moe_reduce.families import ParameterLayout
from moe_reduce.storage import gguf_blocks, native_layout
from moe_reduce.storage.tensors import Entry, Source

SHORT = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}  # types that a file may be written in
WHOLE = np.dtype(np.float32)  # of the library's dequantised values
ROWS = 2048  # dequantised at a time: the library needs several times the memory of what it returns


@dataclass(frozen=True)
class Piece:
    """One tensor of a model directory, or the part of it that one tensor of the file holds.

    leaf, stored: their layouts. name: of the file's tensor. read: its values, or a part of its blocks, with its axes.
    """

    leaf: ParameterLayout
    stored: ParameterLayout
    name: str
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def values(self) -> np.ndarray:
        """Values with the axes of the parameter."""
        return self.stored.from_stored(self.read())


class GgufTensors:
    """The same interface as TensorFiles: tensors as a model directory would hold them, by the names they have there.

    Values are fp32, but those that a file without quantised tensors holds as fp16 or bf16 stay so. blocks: matrices of
    Q8_0 and Q4_0 are quantised matrices in our layout instead, if all tensors of a parameter are of one type. Raises
    UserError when the tensors of the file are not those of the model.
    """

    def __init__(self, path: Path, config: ModelConfig, blocks: bool = False):
        self.directory = path
        self._file = read_gguf(path)
        self._short = _short(self._file)
        stored = families.gguf_layouts(config)
        _check(self._file, stored)
        self._tensors = dict(self._file.tensors)
        pairs = [
            (leaf, self._by_expert(other))
            for leaf, other in zip(families.parameter_layouts(config), stored, strict=True)
        ]
        schemes = {leaf.path: self._scheme(leaf, other) if blocks else None for leaf, other in pairs}
        kept = {path: scheme for path, scheme in schemes.items() if scheme is not None}
        self.quantisation: Mapping[str, Any] = native_layout.described(kept) or {}
        self._pieces: dict[str, list[Piece]] = {}
        for leaf, other in pairs:
            for index in np.ndindex(leaf.stacked):
                for piece in self._pieces_of(leaf, other, index, schemes[leaf.path]):
                    self._pieces.setdefault(piece.leaf.name(index), []).append(piece)
        self.entries = {name: self._entry(pieces[0]) for name, pieces in self._pieces.items()}

    def _by_expert(self, leaf: ParameterLayout) -> ParameterLayout:
        """The layout with each expert's slice of a layer's tensor as a tensor of its own."""
        if leaf.stored_axes[0] != "E" or len(leaf.stored_axes) < 3:
            return leaf
        for name in leaf.names():
            whole = self._tensors.pop(name)
            slices = (StoredTensor(whole.kind, whole.shape[1:], data) for data in whole.data)
            self._tensors |= {f"{name}.{expert}": tensor for expert, tensor in enumerate(slices)}
        axes = " ".join(leaf.stored_axes[1:])
        return dataclasses.replace(leaf, tensor=leaf.tensor._replace(name=f"{leaf.tensor.name}.{{expert}}", axes=axes))

    def _scheme(self, leaf: ParameterLayout, stored: ParameterLayout) -> Scheme | None:
        """The scheme of a matrix whose tensors have blocks that are kept; None for others."""
        kinds = {self._tensors[name].kind.name for name in stored.names()}
        kept = leaf.record.is_matrix and len(stored.stored_shape) == 2 and len(kinds) == 1
        return gguf_blocks.SCHEMES.get(kinds.pop()) if kept else None

    def _pieces_of(
        self, leaf: ParameterLayout, stored: ParameterLayout, index: tuple[int, ...], scheme: Scheme | None
    ) -> Iterator[Piece]:
        name = stored.name(index)
        tensor = self._tensors[name]
        if scheme is None:
            yield Piece(leaf, stored, name, self._dtype(tensor), partial(self._values, tensor))
            return
        (codes, scales), (their_codes, their_scales) = (
            [part.leaf for part in native_layout.parts(one, scheme)] for one in (leaf, stored)
        )
        kind = native_layout.CODES.get(scheme.code, native_layout.BYTES)
        yield Piece(codes, their_codes, name, kind, partial(gguf_blocks.codes, tensor))
        yield Piece(scales, their_scales, name, gguf_blocks.SCALE, partial(gguf_blocks.scales, tensor))

    def read(self, name: str) -> np.ndarray:
        """Values of the tensor, dequantised unless its blocks are kept."""
        pieces = self._pieces[name]
        try:
            return families.to_stored([(piece.leaf, piece.values()) for piece in pieces])
        except NotImplementedError:
            there = pieces[0].name
            raise UserError(
                f"tensor {there} in {self._file.path} is {self._tensors[there].kind.name}, which the library gguf does "
                "not dequantise: give a file in another type, such as Q8_0"
            ) from None

    def read_whole(self, name: str) -> np.ndarray:
        """The same as `read`."""
        return self.read(name)

    def source(self, name: str) -> Source:
        """A function that reads the tensor: its bytes are not those of a model directory."""
        return partial(self.read, name)

    def _entry(self, piece: Piece) -> Entry:
        shape = piece.leaf.stored_shape
        return Entry(self._file.path, shape, piece.dtype, 0, math.prod(shape) * piece.dtype.itemsize)

    def _dtype(self, tensor: StoredTensor) -> np.dtype:
        return self._short if self._short is not None and SHORT.get(tensor.kind.name) == self._short else WHOLE

    def _values(self, tensor: StoredTensor) -> np.ndarray:
        dtype = self._dtype(tensor)
        return dequantised(tensor) if dtype == WHOLE else tensor.data.view(dtype)


def dequantised(tensor: StoredTensor) -> np.ndarray:
    """Values of a tensor, fp32, as the library dequantises them."""
    from gguf.quants import dequantize

    if tensor.kind.name == "F32":
        return tensor.data
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    values = np.empty((len(rows), tensor.shape[-1]), WHOLE)
    for start in range(0, len(rows), ROWS):
        values[start : start + ROWS] = dequantize(rows[start : start + ROWS], tensor.kind)
    return values.reshape(tensor.shape)


def _short(file: GgufFile) -> Any:
    """The dtype of a file that was written in fp16 or bf16; None if it has tensors of several other types than fp32."""
    kinds = {tensor.kind.name for tensor in file.tensors.values()} - {"F32"}
    return SHORT.get(*kinds) if len(kinds) == 1 else None


def _check(file: GgufFile, leaves: Sequence[ParameterLayout]) -> None:
    expected = {name: leaf.stored_shape for leaf in leaves for name in leaf.names()}
    for name, shape in expected.items():
        if name not in file.tensors:
            raise UserError(f"{file.path} has no tensor {name}, which its metadata calls for: fetch it again")
        if file.tensors[name].shape != shape:
            found = file.tensors[name].shape
            raise UserError(
                f"tensor {name} in {file.path} has shape {found}, the metadata says {shape}: fetch it again"
            )
    unknown = sorted(set(file.tensors) - set(expected))
    if unknown:
        raise UserError(
            f"tensor {unknown[0]} in {file.path} has no place in this architecture ({len(unknown)} such): the model "
            "computes something that is not supported"
        )
