"""Keys of files that describe a model: config.json, and the metadata of GGUF."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_reduce.core.errors import UserError

LARGEST_FLOAT = 2**64  # of a float that a file gives as an integer


@dataclass(frozen=True)
class Key:
    """One key of a file and the type of its value.

    optional: null means None, and so does a key left out, unless the family's defaults have it.
    """

    name: str
    kind: type
    optional: bool = False

    def value(self, flat: Mapping[str, Any]) -> Any:
        """The value in a file's content; UserError when it is missing or of another type."""
        value = flat.get(self.name)
        if value is None and self.optional:
            return None
        if value is None:
            raise UserError(f"{self.name} is missing: add it")
        if self.kind is float and type(value) is int and abs(value) < LARGEST_FLOAT:
            return float(value)
        if type(value) is not self.kind:
            raise UserError(f"{self.name} must be {self.kind.__name__}, got {value!r}")
        return value
