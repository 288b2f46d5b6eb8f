"""Calibrated quantisation from file to file: roundings for `files.quantise_files` that have seen a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.families import ParameterLayout, parameter_layouts
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, by_path, select
from moe_reduce.models.weights import Quantised, is_quantised
from moe_reduce.quantization.calibrated import Calibration, CalibrationReport, Settings, Text, quantise
from moe_reduce.quantization.folds import Leaves
from moe_reduce.reduction.files import Directory
from moe_reduce.storage.model_directory import load


def calibrated(
    directory: Directory, execution: ExecutionConfig, settings: Settings, batches: Sequence[Mapping[str, Any]]
) -> "Streamed | Whole":
    """Make the rounding of a model's matrices: one layer at a time is in memory, or a whole model with a pool."""
    if directory.config.moe is not None and directory.config.moe.placement == "shared":
        return Whole(load(directory.path, execution=execution), settings, batches)
    return Streamed(directory, execution, settings, batches)


class Whole:
    """Values of a model that was quantised in memory, such as one with a pool, which every layer reads."""

    def __init__(self, model: Model, settings: Settings, batches: Sequence[Mapping[str, Any]]):
        self._folds = settings.method == "awq"
        found, self.report = quantise(model, batches, settings)
        self._flat = trees.flatten(found.params)

    def __call__(self, record: Parameter, index: tuple[int, ...], matrix: np.ndarray) -> Quantised:
        """Quantised value of one tensor of a parameter."""
        del matrix
        return jax.tree.map(lambda leaf: leaf[index], self._flat[record.path])

    def changed(self, record: Parameter, index: tuple[int, ...]) -> np.ndarray | None:
        """Values of a tensor that is not quantised, where scales may be folded into it."""
        value = self._flat[record.path]
        return np.asarray(value[index]) if self._folds and record.stacked and not is_quantised(value) else None


class Streamed:
    """Values of a model's matrices, calibrated layer by layer as a caller asks for them in the order of layers.

    In memory are one layer, its quantised values, and the residual stream of the text.
    """

    def __init__(
        self, directory: Directory, execution: ExecutionConfig, settings: Settings, batches: Sequence[Mapping[str, Any]]
    ):
        self._directory, self._records = directory, by_path(directory.config)
        self._calibration = Calibration(directory.config, execution, settings)
        self._batches = batches
        self._text: Text | None = None
        self._outside: Leaves = {}
        self._number, self._layer = -1, Leaves()

    @property
    def report(self) -> CalibrationReport:
        """Errors and rare experts so far."""
        return self._calibration.report

    def __call__(self, record: Parameter, index: tuple[int, ...], matrix: np.ndarray) -> Quantised:
        """Quantised value of one tensor of a parameter. index: its layer and expert, as far as it is numbered."""
        if not record.stacked:
            if record.path not in self._outside:
                self._outside |= self._calibration.before({record.path: jnp.asarray(matrix)})
            return self._outside[record.path]
        self._advance(index[0])
        return jax.tree.map(lambda leaf: leaf[index[1:]], self._layer[record.path])

    def changed(self, record: Parameter, index: tuple[int, ...]) -> np.ndarray | None:
        """Values of a tensor that is not quantised, where scales are folded into it; None where it stays as it is."""
        if not record.stacked or self._calibration.settings.method != "awq":
            return None
        self._advance(index[0])
        value = self._layer[record.path]
        return None if is_quantised(value) else np.asarray(value[index[1:]])

    def _advance(self, number: int) -> None:
        """Quantise layers up to this one."""
        if self._text is None:
            embedding = {record.path: self._outside.get(record.path) for record in self._embedding()}
            read = {path: self._read(self._leaf(path), ()) for path, value in embedding.items() if value is None}
            self._outside |= self._calibration.before(read)
            self._text = self._calibration.begin({path: self._outside[path] for path in embedding}, self._batches)
        while self._number < number:
            self._number += 1
            found = {leaf.path: self._read(leaf, (self._number,)) for leaf in self._stacked()}
            self._layer = self._calibration.layer(self._number, found, {}, self._text)

    def _embedding(self) -> tuple[Parameter, ...]:
        return select(self._directory.config, component="embedding")

    def _stacked(self) -> list[ParameterLayout]:
        return [leaf for leaf in parameter_layouts(self._directory.config) if leaf.record.stacked]

    def _leaf(self, path: str) -> ParameterLayout:
        return next(leaf for leaf in parameter_layouts(self._directory.config) if leaf.path == path)

    def _read(self, leaf: ParameterLayout, index: tuple[int, ...]) -> jax.Array:
        """Read a parameter, or its values in one layer."""
        rest = leaf.stacked[len(index) :]
        if not rest:
            return jnp.asarray(self._directory.view(leaf, index))
        parts: list[Any] = [self._directory.view(leaf, (*index, expert)) for (expert,) in np.ndindex(*rest)]
        return jnp.asarray(np.stack(parts))
