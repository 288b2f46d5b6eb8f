"""Layout of a parameter on disk: names of its tensors, and the relation of their axes to those of the parameter.

A family states a `Tensor` for each parameter path; everything else about the parameter comes from its record in
models/records.py. Letters are those of moe_reduce.models. Rotated channels are in the order of Hugging Face.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.parameters import Parameter, parameters

NUMBERED = {"layer": "N", "expert": "E"}  # placeholder in a tensor's name -> the axis of the parameter that it numbers
MODULE_SUFFIX = ".weight"


class Tensor(NamedTuple):
    """Name and axes on disk of the tensors of one parameter.

    name: with {layer} and {expert} it names one tensor for each, stacked on the first axes of the parameter.
    axes: letters of the axes on disk: "HC D" is a matrix whose rows are heads times head width. A digit numbers the
    parts of a tensor that several parameters share: "H0C D", "H1C D" and "H2C D" under one name, interleaved by head.
    In a tensor of one parameter a digit is an axis of size 1.
    None: [outputs, inputs] for a matrix, as torch's Linear stores it, and one flat axis for any other parameter.
    rotary_pairs: on disk, the two numbers of a head's width C that are rotated together lie side by side; in a
    parameter, they lie half of the width apart.
    """

    name: str
    axes: str | None = None
    rotary_pairs: bool = False


@dataclass(frozen=True)
class ParameterLayout:
    """Layout of one parameter. parts: number of parameters that share its tensors, itself included."""

    record: Parameter
    tensor: Tensor
    parts: int = 1

    @property
    def path(self) -> str:
        """Path of the parameter."""
        return self.record.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.record.shape

    @property
    def numbered(self) -> str:
        """Letters of the leading axes that number tensors: N, E, NE or none."""
        letters = "".join(letter for key, letter in NUMBERED.items() if f"{{{key}}}" in self.tensor.name)
        assert self.record.axes.startswith(letters), (self.path, self.record.axes, self.tensor.name)
        return letters

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the `numbered` axes."""
        return self.shape[: len(self.numbered)]

    @property
    def stored_axes(self) -> tuple[str, ...]:
        """Letters of each axis on disk."""
        if self.tensor.axes is not None:
            return tuple(self.tensor.axes.split())
        inner = self._inner_axes
        if self.record.is_matrix:
            return tuple("".join(x for x in side if x in inner) for side in (self.record.outputs, self.record.inputs))
        return (inner,) if inner else ()

    @property
    def _inner_axes(self) -> str:
        """Axes of the parameter within one tensor."""
        return self.record.axes[len(self.numbered) :]

    @property
    def _sizes(self) -> dict[str, int]:
        """Size by letter; a digit has the size `parts`."""
        sizes = dict(zip(self.record.axes, self.shape, strict=True))
        return sizes | {letter: self.parts for letter in "".join(self.stored_axes) if letter.isdigit()}

    @property
    def stored_expert_axis(self) -> int | None:
        """Axis of a tensor on disk that numbers experts; None where there is none, or each expert has its tensor."""
        return self.stored_axes.index("E") if "E" in self.stored_axes else None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each tensor on disk."""
        sizes = self._sizes
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.stored_axes)

    def name(self, index: Sequence[int] = ()) -> str:
        """Name of the tensor at this index on the `numbered` axes."""
        numbers = dict(zip(self.numbered, index, strict=True))
        if "N" in numbers:
            numbers["N"] = self.record.layers[numbers["N"]]
        return self.tensor.name.format(**{key: numbers.get(letter) for key, letter in NUMBERED.items()})

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the parameter's values."""
        return [self.name(index) for index in np.ndindex(self.stacked)]

    def module(self, index: Sequence[int] = ()) -> str:
        """Name of the module that owns the tensor, as PyTorch and PEFT call it."""
        return self.name(index).removesuffix(MODULE_SUFFIX)

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        """The part of a tensor on disk that is the parameter's, with the parameter's axes.

        A view of the tensor, unless its rotary pairs lie side by side.
        """
        letters, sizes = "".join(self.stored_axes), self._sizes
        part = [int(letter) if letter.isdigit() else slice(None) for letter in letters]
        left = [letter for letter in letters if letter.isalpha()]
        # with the ellipsis, indexing returns a view even of a scalar
        view = tensor.reshape([sizes[x] for x in letters])[*part, ...].transpose(
            [left.index(x) for x in self._inner_axes]
        )
        return self._halves(view) if self.tensor.rotary_pairs else view

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `from_stored`, for a parameter that does not share its tensors."""
        assert self.parts == 1, self.path
        axes = self._inner_axes
        array = self._pairs(array) if self.tensor.rotary_pairs else array
        order = [axes.index(letter) for letter in "".join(self.stored_axes) if letter.isalpha()]
        return array.transpose(order).reshape(self.stored_shape)

    def _halves(self, array: np.ndarray) -> np.ndarray:
        """Reorder the width of each head: the first number of each pair, then the second of each."""
        order_C = np.arange(self._sizes["C"]).reshape(-1, 2).T.reshape(-1)
        return np.take(array, order_C, self._inner_axes.index("C"))

    def _pairs(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `_halves`: the two numbers of each pair side by side."""
        order_C = np.arange(self._sizes["C"]).reshape(2, -1).T.reshape(-1)
        return np.take(array, order_C, self._inner_axes.index("C"))

    def part(self, suffix: str, inputs: int, outputs: int | None = None) -> "ParameterLayout":
        """Layout of tensors that hold a part of a matrix, such as its scales, and whose names end in `suffix`.

        inputs: size of the axis I that replaces the input axes, 0 for none. outputs: the same for the output axes and
        an axis B; None keeps them.
        """
        record, axes = self.record, []
        replaced = {record.inputs: ("I", inputs)}
        if outputs is not None:
            replaced[record.outputs] = ("B", outputs)
        for letter, size, mesh_axis in zip(record.axes, record.shape, record.mesh_axes, strict=True):
            group = next((group for group in replaced if letter in group), "")
            if not group:
                axes.append((letter, size, mesh_axis))
            elif letter == group[0] and replaced[group][1]:
                axes.append((*replaced[group], None))
        letters, shape, mesh_axes = ("".join(x for x, _, _ in axes), tuple(x for _, x, _ in axes),
                                     tuple(x for _, _, x in axes))  # fmt: skip
        matrix = {"inputs": "I", "outputs": record.outputs if outputs is None else "B"}
        sides = matrix if inputs and outputs != 0 else {"inputs": "", "outputs": ""}
        part = dataclasses.replace(record, axes=letters, shape=shape, mesh_axes=mesh_axes, **sides)
        stored = None if self.tensor.axes is None else self._stored_part(letters)
        return ParameterLayout(part, self.tensor._replace(name=self.tensor.name + suffix, axes=stored), self.parts)

    def _stored_part(self, letters: str) -> str:
        """Axes on disk of a part with these axes in memory, whose tensor several parameters may share."""
        groups = []
        for group in self.stored_axes:
            digits = "".join(x for x in group if x.isdigit())
            named = "".join(x for x in group if x in letters)
            side = "I" if set(self.record.inputs) & set(group) else "B"
            groups.append(group if named else digits + (side if side in letters else ""))
        return " ".join(filter(None, groups))


def layouts(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, ParameterLayout]:
    """Layouts of all parameters of a model by path. tensors: by path, those of a family."""
    found = {record.path: (record, tensors[record.path]) for record in parameters(config)}
    shared = collections.Counter((record.stack, tensor.name) for record, tensor in found.values())
    return {
        path: ParameterLayout(record, tensor, shared[record.stack, tensor.name])
        for path, (record, tensor) in found.items()
    }


def to_stored(pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
    """One tensor on disk, made of the pieces (layout, array) of all parameters that share it, or of a single one."""
    first, array = pieces[0]
    if first.parts == 1:
        return first.to_stored(array)
    tensor = np.empty(first.stored_shape, array.dtype)
    for leaf, array in pieces:
        leaf.from_stored(tensor)[...] = array
    return tensor
