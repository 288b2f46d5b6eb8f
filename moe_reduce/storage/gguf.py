"""Weights of a GGUF file under the names and layouts of a model directory, dequantised when they are read."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_reduce import families
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import GgufFile, StoredTensor, read_gguf
from moe_reduce.families import Leaf
from moe_reduce.storage.tensors import Entry, Source

SHORT = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}  # types that a file may be written in
WHOLE = np.dtype(np.float32)  # of the library's dequantised values
ROWS = 2048  # dequantised at a time: the library needs several times the memory of what it returns


class GgufTensors:
    """The same interface as TensorFiles: tensors as a model directory would hold them, by the names they have there.

    Values are fp32, but those that a file without quantised tensors holds as fp16 or bf16 stay so. Raises UserError
    when the tensors of the file are not those of the model.
    """

    def __init__(self, path: Path, config: ModelConfig):
        self.directory = path
        self.quantisation: Mapping[str, Any] = {}
        self._file = read_gguf(path)
        self._short = _short(self._file)
        pairs = list(zip(families.leaves(config), families.gguf_leaves(config), strict=True))
        _check(self._file, [stored for _, stored in pairs])
        self._pieces: dict[str, list[tuple[Leaf, Leaf, tuple[int, ...]]]] = {}
        for leaf, stored in pairs:
            for index in np.ndindex(leaf.stacked):
                self._pieces.setdefault(leaf.name(index), []).append((leaf, stored, index))
        self.entries = {name: self._entry(name) for name in self._pieces}

    def read(self, name: str) -> np.ndarray:
        """Values of the tensor, dequantised."""
        parts = self._pieces[name]
        return families.to_stored([(leaf, stored.from_stored(self._values(stored, i))) for leaf, stored, i in parts])

    def read_whole(self, name: str) -> np.ndarray:
        """The same as `read`."""
        return self.read(name)

    def source(self, name: str) -> Source:
        """A function that reads the tensor: its bytes are not those of a model directory."""
        return partial(self.read, name)

    def _entry(self, name: str) -> Entry:
        leaf, stored, index = self._pieces[name][0]
        dtype = self._dtype(self._file.tensors[stored.name(index)])
        return Entry(self._file.path, leaf.stored_shape, dtype, 0, int(np.prod(leaf.stored_shape)) * dtype.itemsize)

    def _dtype(self, tensor: StoredTensor) -> np.dtype:
        return self._short if self._short is not None and SHORT.get(tensor.kind.name) == self._short else WHOLE

    def _values(self, leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
        name = leaf.name(index)
        tensor = self._file.tensors[name]
        dtype = self._dtype(tensor)
        if dtype != WHOLE:
            return tensor.data.view(dtype)
        try:
            return dequantised(tensor)
        except NotImplementedError:
            raise UserError(
                f"tensor {name} in {self._file.path} is {tensor.kind.name}, which the library gguf does not "
                "dequantise: give a file in another type, such as Q8_0"
            ) from None


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


def _check(file: GgufFile, leaves: list[Leaf]) -> None:
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
