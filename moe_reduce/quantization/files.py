"""Quantisation from file to file: one layer at a time is in memory, so that the model need not fit."""

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.core.schemes import Scheme
from moe_reduce.families import ParameterLayout, of_config, own_config, parameter_layouts
from moe_reduce.models.parameters import Parameter, by_path
from moe_reduce.models.weights import Quantised, quantise
from moe_reduce.models.weights.scales import Ranges, extremes
from moe_reduce.reduction.files import Directory
from moe_reduce.storage import compressed_tensors, native_layout, quantised
from moe_reduce.storage.model_directory import Contents
from moe_reduce.storage.tensors import TensorFiles, TensorItem, write_file
from moe_reduce.storage.weight_parts import Part


class Quantiser(Protocol):
    """Rounding of a model's matrices, called for each tensor in the order of layers."""

    def __call__(self, record: Parameter, index: tuple[int, ...], matrix: np.ndarray) -> Quantised:
        """Quantise one tensor of a parameter. index: its layer and expert, as far as it is numbered."""
        ...

    def changed(self, record: Parameter, index: tuple[int, ...]) -> np.ndarray | None:
        """New values of a tensor that is not quantised; None where it stays as it is."""
        ...


@dataclass(frozen=True)
class Target:
    """The quantised model to be written: its architecture, the scheme of each matrix by path, and its layout."""

    config: ModelConfig
    schemes: Mapping[str, Scheme]
    parts: quantised.Layout
    stated: Mapping[str, Any] | None

    @classmethod
    def native(cls, config: ModelConfig, schemes: Mapping[str, Scheme]) -> "Target":
        """Our layout, which holds every scheme, as a model of our own: no other program must read codes as weights."""
        return cls(own_config(config), schemes, native_layout.parts, native_layout.described(schemes))

    @classmethod
    def compressed_tensors(cls, config: ModelConfig, schemes: Mapping[str, Scheme]) -> "Target":
        """The layout of compressed-tensors; UserError for a model or a scheme that transformers cannot open in it."""
        family = of_config(config)
        if family == of_config(own_config(config)):
            raise UserError(f"only moe_reduce opens this architecture ({family.name}): choose --format=native")
        chosen = [(leaf, schemes[leaf.path]) for leaf in parameter_layouts(config) if leaf.path in schemes]
        return cls(config, schemes, compressed_tensors.parts, compressed_tensors.described(chosen))


@dataclass
class Report:
    """Bytes before and after, and squared errors and sizes of the matrices, by component."""

    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, component: str, before: int, after: int) -> None:
        """Count the bytes of one tensor."""
        self.before[component] = self.before.get(component, 0) + before
        self.after[component] = self.after.get(component, 0) + after

    def compare(self, component: str, matrix: Any, value: Quantised) -> None:
        """Count the squared error of one matrix and its squared size."""
        error, size = _squares(matrix, value)
        errors, sizes = self.squares.get(component, (0.0, 0.0))
        self.squares[component] = (errors + float(error), sizes + float(size))

    def errors(self) -> dict[str, float]:
        """Norm of the error of each component's matrices, relative to the norm of the matrices."""
        return {name: math.sqrt(error / size) if size else 0.0 for name, (error, size) in self.squares.items()}


@jax.jit
def _squares(matrix: jax.Array, value: Quantised) -> tuple[jax.Array, jax.Array]:
    wide = matrix.astype(jnp.float32)
    return jnp.sum(jnp.square(value.dequantised() - wide)), jnp.sum(jnp.square(wide))


@dataclass(frozen=True)
class ToNearest:
    """Rounding to nearest. schemes: by path. ranges: chooses the range of values that a scale covers."""

    schemes: Mapping[str, Scheme]
    ranges: Ranges = extremes

    def __call__(self, record: Parameter, index: tuple[int, ...], matrix: np.ndarray) -> Quantised:
        """Round one tensor by itself."""
        del index
        return _nearest(matrix, record, self.schemes[record.path], self.ranges)

    def changed(self, record: Parameter, index: tuple[int, ...]) -> None:
        """Leave every other tensor as it is."""
        del record, index


_nearest: Any = jax.jit(quantise, static_argnums=(1, 2, 3))


def quantise_files(
    directory: Directory, target: Target, spool: Path, rounding: Quantiser
) -> tuple[list[TensorItem], Report]:
    """Quantise layer by layer into files of an empty directory `spool`: (tensors of the result, report).

    The tensors lie in `spool` or in the model's own files, and are to be copied from there.
    """
    report, items = Report(), []
    layers = itertools.groupby(sorted(_pieces(target.config), key=lambda piece: piece[0]), key=lambda piece: piece[0])
    for number, pieces in tqdm(list(_listed(layers)), unit="layer", disable=not sys.stderr.isatty()):
        found = _layer(directory, target, rounding, pieces, report)
        made = [item for item in found if isinstance(item[3], np.ndarray)]
        items += [item for item in found if not isinstance(item[3], np.ndarray)]
        if made:
            name = f"{number}.safetensors"
            write_file(spool / name, made)
            stored = TensorFiles(spool, name)
            items += [(*item[:3], stored.entries[item[0]]) for item in made]
    return items, report


def _listed(groups: Iterator[tuple[int, Iterator[Any]]]) -> Iterator[tuple[int, list[Any]]]:
    for number, pieces in groups:
        yield number, list(pieces)


def _pieces(config: ModelConfig) -> Iterator[tuple[int, ParameterLayout, tuple[int, ...]]]:
    """Layer (-1 for what belongs to none), layout and indices of each tensor of each parameter."""
    for leaf in parameter_layouts(config):
        for index in np.ndindex(leaf.stacked):
            yield index[0] if leaf.numbered.startswith("N") else -1, leaf, index


def _layer(
    directory: Directory, target: Target, rounding: Quantiser, pieces: list[Any], report: Report
) -> list[TensorItem]:
    """The tensors of one layer: quantised ones as arrays, the others as functions that read them."""
    sources = {leaf.path: leaf for leaf in parameter_layouts(directory.config)}
    records = by_path(target.config)
    tensors: dict[str, list[tuple[Part, Any]]] = {}
    items: dict[str, TensorItem] = {}
    for _, leaf, index in pieces:
        source, component = sources[leaf.path], leaf.record.component
        changed = None if leaf.path in target.schemes else rounding.changed(records[leaf.path], index)
        if changed is not None:
            changed = changed.astype(directory.files.entries[source.name(index)].dtype)
            report.add(component, changed.nbytes, changed.nbytes)
            tensors.setdefault(leaf.name(index), []).append((Part("", leaf), changed))
            continue
        if leaf.path not in target.schemes:
            item = _kept(directory, (source, leaf), index)
            size = math.prod(item[1]) * item[2].itemsize // leaf.parts
            report.add(component, size, size)
            items[item[0]] = item
            continue
        matrix = directory.view(source, index)
        value = rounding(records[leaf.path], index, matrix)
        report.compare(component, matrix, value)
        report.add(component, matrix.nbytes, sum(array.nbytes for array in jax.tree.leaves(value)))
        for part, array in quantised.arrays_of(leaf, value, target.parts):
            tensors.setdefault(part.leaf.name(index), []).append((part, array))
    return [*items.values(), *(_item(name, made) for name, made in tensors.items())]


def _kept(directory: Directory, layouts: tuple[ParameterLayout, ParameterLayout], index: tuple[int, ...]) -> TensorItem:
    """A tensor that stays as it is; it is read when it is written."""
    source, leaf = layouts
    name, files = source.name(index), directory.files
    dtype = files.entries[name].dtype
    if (source.tensor.axes, source.parts, source.stored_shape) == (leaf.tensor.axes, leaf.parts, leaf.stored_shape):
        return leaf.name(index), leaf.stored_shape, dtype, files.source(name)
    return leaf.name(index), leaf.stored_shape, dtype, lambda: leaf.to_stored(directory.view(source, index))


def _item(name: str, made: list[tuple[Part, Any]]) -> TensorItem:
    part, array = made[0]
    tensor = part.to_disk([(each.leaf, np.asarray(values)) for each, values in made])
    return name, part.stored_shape, part.stored_dtype(array), tensor


def contents(directory: Directory, target: Target, items: list[TensorItem], step: Step) -> Contents:
    """The quantised model, as input of `model_directory.write_directory`. step: appended to the chain."""
    # config.json states the dtype of the parameters that are not quantised
    first = next(leaf for leaf in parameter_layouts(directory.config) if leaf.path not in target.schemes)
    dtype = str(directory.files.entries[first.names()[0]].dtype)
    chain = (*directory.chain, step)
    return Contents(target.config, items, dtype, directory.path, directory.raw, chain, target.stated)
