"""Conversion between frozen dataclasses, ConfigDicts and plain nested values.

An unknown, missing or ill-typed key raises a UserError that names it. A field whose value is a dict of named groups
carries the metadata `kinds`, a mapping from a group's `kind` to its dataclass.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import ml_collections
from ml_collections import config_dict

from moe_reduce.core.errors import UserError

T = TypeVar("T")
LARGEST = 2**1000  # of an integer that stands for a float: near the largest float


def of(value: Any) -> ml_collections.ConfigDict:
    """Copy every field of a dataclass into a ConfigDict; None becomes a placeholder of the field's type."""
    config = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(value))
    for entry in dataclasses.fields(value):
        default = getattr(value, entry.name)
        if dataclasses.is_dataclass(default):
            config[entry.name] = of(default)
        elif isinstance(default, dict):
            config[entry.name] = ml_collections.ConfigDict(default)
        elif default is None:
            kind = _alternatives(hints[entry.name])[0]
            config[entry.name] = config_dict.placeholder(
                ml_collections.ConfigDict if dataclasses.is_dataclass(kind) else kind
            )
        else:
            config[entry.name] = default
    return config


def merge(raw: Any, changes: dict[str, Any], path: str) -> dict[str, Any]:
    """Change some of the nested values; a key that does not exist yet raises UserError. path: the name of `changes`."""
    merged = dict(raw)
    for key, value in changes.items():
        if key not in merged:
            raise UserError(f"config key {path}.{key} is unknown; known here: {', '.join(sorted(merged))}")
        # `stages` is a named list, which a variant replaces as a whole
        nested = isinstance(value, dict) and isinstance(merged[key], dict) and key != "stages"
        merged[key] = merge(merged[key], value, f"{path}.{key}") if nested else value
    return merged


def completed(cls: Any, raw: Any) -> Any:
    """Add keys that an older version did not write, with their defaults, to the nested values of a dataclass."""
    if not isinstance(raw, dict):
        return raw
    hints, defaults = typing.get_type_hints(cls), dataclasses.asdict(cls())
    result = dict(raw)
    for entry in dataclasses.fields(cls):
        (kind,) = _alternatives(hints[entry.name])
        if entry.name not in raw:
            result[entry.name] = defaults[entry.name]
        elif dataclasses.is_dataclass(kind):
            result[entry.name] = completed(kind, raw[entry.name])
        elif "kinds" in entry.metadata and isinstance(raw[entry.name], dict):
            kinds = entry.metadata["kinds"]
            result[entry.name] = {
                name: completed(kinds[group["kind"]], group) if group.get("kind") in kinds else group
                for name, group in raw[entry.name].items()
            }
    return result


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return [hint]


def build(cls: type[T], raw: Any, path: str) -> T:
    """Make a dataclass of nested plain values. Raises UserError unless they hold exactly its keys, of its types.

    path: the name of the group in the configuration, for messages; empty at the top.
    """
    if not isinstance(raw, dict):
        raise UserError(f"config key {path} must be a group of keys, got {raw!r}")
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in sorted(set(raw) ^ set(fields)):
        state = "unknown" if key in raw else "missing"
        raise UserError(f"config key {prefix}{key} is {state}; the keys here are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, entry in fields.items():
        if "kinds" in entry.metadata:
            values[key] = _groups(entry.metadata["kinds"], raw[key], prefix + key)
        else:
            values[key] = _value(hints[key], raw[key], prefix + key)
    return cls(**values)


def _value(hint: Any, value: Any, path: str) -> Any:
    """Return the value as the type of a field; UserError when it is of another type."""
    (kind,) = _alternatives(hint)
    if value is None and kind is not hint:
        return None
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)  # type: ignore[arg-type]
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"config key {path} must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
        return value
    if kind is float and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config key {path} must be {kind.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config key {path} must be a finite number, got {value!r}")
    return value


def _groups(kinds: Mapping[str, Any], raw: Any, path: str) -> dict[str, Any]:
    """Make a dataclass of each named group, chosen by its `kind`."""
    if not isinstance(raw, dict):
        raise UserError(f"config key {path} must be a group of named groups, got {raw!r}")
    made = {}
    for name, group in raw.items():
        kind: Any = group["kind"] if isinstance(group, dict) and "kind" in group else None
        if kind not in kinds:
            raise UserError(f"config key {path}.{name}.kind must be one of {', '.join(kinds)}, got {kind!r}")
        made[name] = build(kinds[kind], group, f"{path}.{name}")
    return made
