"""Read and write the parameter tree as tensors on disk, with the names and layouts of the model's family.

A quantised weight consists of several tensors: see quantised.py.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_reduce.core import memory, trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import is_gguf
from moe_reduce.families import ParameterLayout, by_path, of_config, parameter_layouts, text_part
from moe_reduce.storage import quantised
from moe_reduce.storage.gguf import GgufTensors
from moe_reduce.storage.tensors import Entry, TensorFiles, TensorItem, Tensors
from moe_reduce.storage.weight_parts import Part


def open_tensors(path: Path, config: ModelConfig, blocks: bool = False) -> Tensors:
    """Open the tensors of a model directory, or of a GGUF file; UserError when they are not whole.

    blocks: matrices of a GGUF file stay quantised if they have blocks of a scheme of ours.
    """
    if is_gguf(path):
        return GgufTensors(path, config, blocks)
    files = TensorFiles(path)
    files.quantisation = quantised.stated(path)
    return files


def check_names(files: Tensors, config: ModelConfig) -> None:
    """Check the headers of the files: they must hold exactly the tensors of the model, in the right shapes.

    Raises UserError when a tensor is missing, unknown or of another shape. An output table that is stored although
    config.json ties it to the embedding is read and must equal it. The one table of tied embeddings may be stored under
    the name of the output table; it is then renamed in `files`. Tensors of parts that nothing computes are named on
    stderr.
    """
    family = of_config(config)
    tied = config.tied_embeddings and config.embedding_factor is None
    if tied and family.input_table not in files.entries and family.output_table in files.entries:
        files.entries[family.input_table] = files.entries.pop(family.output_table)
    _keep_language_model(files, config)
    _split_experts(files, config)
    parts = [part for leaf in parameter_layouts(config) for part in quantised.parts_of(leaf, files)]
    expected = {name: part.stored_shape for part in parts for name in part.leaf.names()}
    for name, shape in expected.items():
        if name not in files.entries:
            raise UserError(f"{files.directory} has no tensor {name}, which its config.json calls for: fetch it again")
        entry = files.entries[name]
        if entry.shape != shape:
            raise UserError(f"tensor {name} in {entry.file} has shape {entry.shape}, config.json says {shape}: fix one")
    unknown = [name for name in files.entries if name not in expected and not family.ignored.fullmatch(name)]
    unknown = [name for name in unknown if not quantised.is_spare(name, files)]
    left = left_out(files, config)
    if left:
        print(
            f"{files.directory}: {len(left)} tensors, such as {left[0]}, predict further tokens and are not read",
            file=sys.stderr,
        )
        unknown = [name for name in unknown if name not in set(left)]
    output = family.output_table
    if tied and output in unknown:
        _check_tied(files, family.input_table, output)
        unknown.remove(output)
    if unknown:
        raise UserError(
            f"tensor {min(unknown)} in {files.entries[min(unknown)].file} has no place in this model "
            f"({len(unknown)} such): remove it, or correct config.json"
        )


def _keep_language_model(files: Tensors, config: ModelConfig) -> None:
    """Rename the tensors of the language model of a multimodal one, and forget the others, which stderr says."""
    expected = [name for leaf in parameter_layouts(config) for name in leaf.names()]
    expected += [name.format(layer=layer) for name in of_config(config).fused for layer in range(config.layers)]
    names = text_part.renamed(files.entries, expected, of_config(config).input_table)
    others = sorted(set(files.entries) - set(names.values()))
    if not names:
        return
    kept = {name: files.entries[there] for name, there in names.items()}
    files.entries.clear()
    files.entries.update(kept)
    if others:
        what = f"{len(others)} tensors, such as {others[0]}, are not of the language model"
        print(f"{files.directory}: {what} and are not read", file=sys.stderr)


def _split_experts(files: Tensors, config: ModelConfig) -> None:
    """Name the parts of tensors that hold all experts of a layer, as if each expert had its own tensors."""
    experts = 0 if config.moe is None else config.moe.experts
    for (fused, names), layer in itertools.product(of_config(config).fused.items(), range(config.layers)):
        name = fused.format(layer=layer)
        if name not in files.entries:
            continue
        entry = files.entries.pop(name)
        if len(entry.shape) != 3 or entry.shape[0] != experts or entry.shape[1] % len(names):
            raise UserError(
                f"tensor {name} in {entry.file} has shape {entry.shape}, config.json says {experts} experts: fix one"
            )
        shape = (entry.shape[1] // len(names), entry.shape[2])
        size = math.prod(shape) * entry.dtype.itemsize
        for place, (expert, part) in enumerate(itertools.product(range(experts), names)):
            start = entry.start + place * size
            there = dataclasses.replace(entry, shape=shape, start=start, stop=start + size)
            files.entries[part.format(layer=layer, expert=expert)] = there


def left_out(files: Tensors, config: ModelConfig) -> list[str]:
    """Names of tensors of parts that nothing here computes, such as layers that predict several tokens at once."""
    family = of_config(config)
    return sorted(name for name in files.entries if family.leaves_out(name, config))


def _check_tied(files: Tensors, input_name: str, output_name: str) -> None:
    first, last = files.read(input_name), files.read(output_name)
    # Compared as bytes, because numpy may lack the dtype and NaN must equal itself.
    if first.dtype != last.dtype or not np.array_equal(first.view(np.uint8), last.view(np.uint8)):
        raise UserError(
            f"{output_name} in {files.directory} differs from the embedding, but config.json ties them: "
            "set tie_word_embeddings to false"
        )


def read_params(
    files: Tensors, config: ModelConfig, dtype: Any = None, shardings: trees.Tree | None = None
) -> dict[str, Any]:
    """Read the parameter tree as jax arrays, one parameter at a time, so that host memory holds no second copy.

    dtype: dtype of every parameter that is not quantised; None keeps the stored one. shardings: a tree of
    jax.sharding.Sharding with the structure of the parameters; each device then reads only its own slices.
    """
    check_names(files, config)
    _check_room(files, config, dtype)
    by_leaf = dict.fromkeys(by_path(config)) if shardings is None else trees.flatten(shardings)
    if set(by_leaf) != set(by_path(config)):
        raise UserError(f"shardings do not match the parameters: {sorted(set(by_leaf) ^ set(by_path(config)))}")
    return trees.unflatten(
        {leaf.path: _read(files, leaf, dtype, by_leaf[leaf.path]) for leaf in parameter_layouts(config)}
    )


def _check_room(files: Tensors, config: ModelConfig, dtype: Any) -> None:
    """Raise UserError when a limit of address space leaves no room for the weights beside the mapped files."""
    stored = sum(entry.stop - entry.start for entry in files.entries.values())
    count = sum(math.prod(leaf.shape) for leaf in parameter_layouts(config))
    memory.check_room(stored + (stored if dtype is None else count * np.dtype(dtype).itemsize), str(files.directory))


def _read(files: Tensors, leaf: ParameterLayout, dtype: Any, sharding: Any) -> Any:
    parts, scheme = quantised.parts_of(leaf, files), quantised.scheme_of(leaf, files)
    quantised.check_runs(leaf, files)
    found = {}
    for part in parts:
        part.check_dtypes(files)
        if part.key or scheme is None:
            stored = files.entries[part.leaf.names()[0]].dtype
            kind = _dtype(files, leaf, dtype) if scheme is None else part.memory or stored
            found[part.key] = _read_array(files, part, kind, quantised.sharding_of(part, leaf, sharding))
    return quantised.value_of(leaf, scheme, found)


def _read_array(files: Tensors, part: Part, kind: np.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    shape = part.leaf.shape
    if sharding is None:
        return jax.device_put(_gather(files, part, (slice(None),) * len(shape), kind))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "only arrays of opaque dtypes have no index"
        return _gather(files, part, index, kind)

    return jax.make_array_from_callback(shape, sharding, read)


def _dtype(files: Tensors, leaf: ParameterLayout, dtype: Any) -> np.dtype:
    """Dtype of a parameter: the given one, else that of its tensors, or the widest of them where they differ."""
    stored = {files.entries[name].dtype: name for name in leaf.names()}
    for name in stored.values():
        check_weight(name, files.entries[name])
    kind = widest(stored) if dtype is None else np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        raise UserError(
            f"{leaf.path} in {files.directory} would be {kind}, which JAX does not enable by default: convert the "
            "weights to float32"
        )
    return kind


def widest(dtypes: Collection[np.dtype]) -> np.dtype:
    """The floating-point dtype that holds all values of these: float32 for bfloat16 with float16."""
    size = max(dtype.itemsize for dtype in dtypes)
    largest = {dtype for dtype in dtypes if dtype.itemsize == size}
    return largest.pop() if len(largest) == 1 else np.dtype(np.float32)


def check_weight(name: str, entry: Entry) -> None:
    """Raise UserError for a tensor that is not a floating-point weight, such as one quantised by another tool."""
    if entry.dtype.kind not in "fV" or entry.dtype.itemsize < 2:  # ml_dtypes' bfloat16 is of kind V
        raise UserError(f"tensor {name} in {entry.file} is {entry.dtype}, not a floating-point weight: convert it")


def _gather(files: Tensors, part: Part, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The slice `index` of an array, copied from the slices of the tensors that it covers."""
    leaf = part.leaf
    count = len(leaf.stacked)
    ranges = [range(size)[places] for size, places in zip(leaf.shape, index, strict=True)]
    result = np.empty([len(numbers) for numbers in ranges], dtype)
    for position, numbers in enumerate(itertools.product(*ranges[:count])):
        target = np.unravel_index(position, result.shape[:count]) if count else ()
        result[target] = part.from_disk(files.read(leaf.name(numbers)))[tuple(index[count:])]
    return result


class Piece(NamedTuple):
    """The values of one tensor that come from one array: its part, indices of layer and expert, and the whole array."""

    part: Part
    numbers: tuple[int, ...]
    array: Any

    def fetch(self) -> np.ndarray:
        """Values of this layer and expert, copied to the host."""
        return np.asarray(self.array[self.numbers])


def write_items(params: Mapping[str, Any], config: ModelConfig) -> Iterator[TensorItem]:
    """Tensors for `write_tensors`, ordered by layer; only one tensor at a time is copied to the host.

    Raises UserError when the parameters do not match the configuration.
    """
    flat = trees.flatten(params)
    _check_params(flat, config)
    tensors: dict[str, list[Piece]] = {}
    for leaf in parameter_layouts(config):
        for part, array in quantised.arrays_of(leaf, flat[leaf.path]):
            for index in np.ndindex(part.leaf.stacked):
                tensors.setdefault(part.leaf.name(index), []).append(Piece(part, index, array))
    for name in sorted(tensors, key=_natural):
        pieces = tensors[name]
        yield name, pieces[0].part.stored_shape, _one_dtype(name, pieces), _source(pieces)


def _check_params(flat: Mapping[str, Any], config: ModelConfig) -> None:
    expected = by_path(config)
    for path in sorted(set(flat) ^ set(expected)):
        state = "not called for by" if path in flat else "missing from the model, but called for by"
        raise UserError(f"parameter {path} is {state} its config: change params and config together")
    for path, leaf in expected.items():
        if tuple(flat[path].shape) != leaf.shape:
            raise UserError(f"parameter {path} has shape {tuple(flat[path].shape)}, its config says {leaf.shape}")


def _one_dtype(name: str, pieces: list[Piece]) -> np.dtype:
    dtypes = {piece.part.leaf.path: piece.part.stored_dtype(piece.array) for piece in pieces}
    if len(set(dtypes.values())) > 1:
        described = ", ".join(f"{path} {dtype}" for path, dtype in dtypes.items())
        raise UserError(f"parameters that share tensor {name} differ in dtype ({described}): convert them to one")
    return next(iter(dtypes.values()))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _source(pieces: list[Piece]) -> Callable[[], np.ndarray]:
    return lambda: pieces[0].part.to_disk([(piece.part.leaf, piece.fetch()) for piece in pieces])
