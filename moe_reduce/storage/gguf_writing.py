"""Writing of a model directory as one GGUF file of llama.cpp, one tensor at a time in memory."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quant_shape_to_byte_shape, quantize

from moe_reduce import families
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.gguf_vocabulary import gguf_vocabulary
from moe_reduce.families import ParameterLayout
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.storage import quantised
from moe_reduce.storage.parameter_tensors import check_names, open_tensors
from moe_reduce.storage.tensors import Tensors

KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7}  # general.file_type
QUANTISATION_VERSION = 2  # of llama.cpp's blocks
DTYPES = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16)}
BLOCK = 32  # values that share a scale in q8_0 and q4_0
REMEDY = "give another program the directory"


def check(path: Path, config: ModelConfig, kind: str) -> None:
    """Raise UserError when a model has no form in GGUF, or its matrices do not fit the blocks of this kind."""
    family = families.of_config(config)
    if family.gguf is None or not isinstance(family, HuggingFaceFamily):
        known = ", ".join(family.name for family in families.FAMILIES if family.gguf is not None)
        raise UserError(f"{path} is of the family {family.name}, and GGUF files are written of {known}")
    lost = families.unwritten(config)
    if lost is not None:
        raise UserError(f"{path} has {lost}, which GGUF files of {family.gguf.architecture} cannot state: {REMEDY}")
    for leaf in families.parameter_layouts(config) if kind != "f16" else ():
        inputs = leaf.record.matrix_shape[0]
        if _is_coded(leaf) and inputs % BLOCK:
            raise UserError(
                f"{kind} has blocks of {BLOCK}, which do not divide the {inputs} inputs of {leaf.path}: choose f16"
            )


def write(path: Path, config: ModelConfig, file: Path, kind: str) -> None:
    """Write a model as a GGUF file, vectors in fp32. path: a model directory or GGUF file. kind: a name of KINDS.

    Raises UserError as `check` does, for a quantised model, and for a tokenizer that llama.cpp has no name for.
    """
    check(path, config, kind)
    tensors, family = open_tensors(path, config), families.of_config(config)
    check_names(tensors, config)
    if any(quantised.scheme_of(leaf, tensors) is not None for leaf in families.parameter_layouts(config)):
        raise UserError(f"{path} is quantised already: export the model that it was made from")
    assert isinstance(family, HuggingFaceFamily)
    assert family.gguf is not None
    writer = GGUFWriter(file, family.gguf.architecture)
    writer.add_name(path.stem)
    writer.add_uint32("general.quantization_version", QUANTISATION_VERSION)
    writer.add_uint32("general.file_type", FILE_TYPES[kind])
    metadata = family.gguf.write(families.gguf_values(config)) | gguf_vocabulary(path, config.vocab_size)
    for key, value in metadata.items():
        _add(writer, key, value)
    layouts = list(zip(families.parameter_layouts(config), families.gguf_layouts(config), strict=True))
    for _, leaf in layouts:
        _announce(writer, leaf, KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in _values(tensors, layouts, KINDS[kind]):
        writer.write_tensor_data(values)
    writer.close()


def _is_coded(leaf: ParameterLayout) -> bool:
    """True for a parameter that is not stored in fp32, as vectors and routers are."""
    return leaf.record.is_matrix and len(leaf.stored_shape) > 1 and leaf.record.component != "router"


def _announce(writer: GGUFWriter, leaf: ParameterLayout, kind: Kind) -> None:
    """Add the names, shapes and types of a parameter's tensors to the header."""
    kind = kind if _is_coded(leaf) else Kind.F32
    dtype, shape = DTYPES.get(kind), leaf.stored_shape
    if dtype is None:
        dtype, shape = np.dtype(np.uint8), quant_shape_to_byte_shape(shape, kind)
    for name in leaf.names():
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)


def _values(
    tensors: Tensors, layouts: list[tuple[ParameterLayout, ParameterLayout]], kind: Kind
) -> Iterator[np.ndarray]:
    """Data of each tensor, in the order of the file."""
    for source, leaf in layouts:
        for index in np.ndindex(leaf.stacked):
            stored = np.ascontiguousarray(leaf.to_stored(_gathered(tensors, source, index)).astype(np.float32))
            if not _is_coded(leaf):
                yield stored
            else:
                yield stored.astype(np.float16) if kind == Kind.F16 else quantize(stored, kind)


def _gathered(tensors: Tensors, source: ParameterLayout, index: tuple[int, ...]) -> np.ndarray:
    """Values of one tensor of the file; those of the experts of a layer lie in several tensors of the model."""
    rest = source.stacked[len(index) :]
    values = [source.from_stored(tensors.read(source.name((*index, *place)))) for place in np.ndindex(rest)]
    return np.stack(values).reshape(*rest, *values[0].shape)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
