"""The arrays that hold a weight, and the tensors on disk that hold these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.families import ParameterLayout, to_stored
from moe_reduce.storage.tensors import Tensors


@dataclass(frozen=True)
class Part:
    """One array of a weight, and its tensors on disk.

    key: its place in a quantised value; empty for an array. leaf: layout, with the names and dtypes that the tensors
    may have: any floating-point ones if `dtypes` is empty. shape: of a tensor, if it is not leaf.stored_shape. memory:
    dtype of the array, if its bytes are stored as another.
    """

    key: str
    leaf: ParameterLayout
    dtypes: tuple[np.dtype, ...] = ()
    shape: tuple[int, ...] | None = None
    memory: np.dtype | None = None

    @property
    def is_by_expert(self) -> bool:
        """True where the first axis of a tensor on disk numbers experts. Kinds that pack values anew say False."""
        return self.leaf.stored_expert_axis == 0 and type(self) is Part

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each tensor on disk."""
        return self.leaf.stored_shape if self.shape is None else self.shape

    def stored_dtype(self, array: Any) -> np.dtype:
        """Dtype of the tensors of an array."""
        return np.dtype(array.dtype) if self.memory is None else self.dtypes[0]

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """The array's values in one tensor."""
        if self.memory is not None:
            tensor = np.ascontiguousarray(tensor).view(self.memory)
        return self.leaf.from_stored(tensor.reshape(self.leaf.stored_shape))

    def to_disk(self, pieces: Sequence[tuple[ParameterLayout, np.ndarray]]) -> np.ndarray:
        """One tensor, made of the pieces of all parameters that share it."""
        tensor = np.ascontiguousarray(to_stored(pieces))
        return (tensor if self.memory is None else tensor.view(self.dtypes[0])).reshape(self.stored_shape)

    def check_dtypes(self, files: Tensors) -> None:
        """Raise UserError for a tensor of another dtype than those that it may have."""
        for name in self.leaf.names() if self.dtypes else ():
            entry = files.entries[name]
            if entry.dtype not in self.dtypes:
                wanted = " or ".join(map(str, self.dtypes))
                raise UserError(
                    f"tensor {name} in {entry.file} is {entry.dtype}, quantised weights need {wanted}: quantise again"
                )
