"""Frozen dataclasses <-> ConfigDict and plain nested values; an unknown, missing or ill-typed key is named."""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

import ml_collections
from ml_collections import config_dict

from moe_reduce.core.errors import UserError

T = TypeVar("T")


def of(value: Any) -> ml_collections.ConfigDict:
    """Every field of a dataclass with its value; a placeholder of its type for None."""
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
    """Nested values with some changed; a key that is not there yet raises UserError."""
    merged = dict(raw)
    for key, value in changes.items():
        if key not in merged:
            raise UserError(f"config key {path}.{key} is unknown; known here: {', '.join(sorted(merged))}")
        # stages are a list with names: a variant has its own
        nested = isinstance(value, dict) and isinstance(merged[key], dict) and key != "stages"
        merged[key] = merge(merged[key], value, f"{path}.{key}") if nested else value
    return merged


def completed(cls: Any, raw: Any) -> Any:
    """What an older version wrote for a dataclass, with the defaults of the keys that it did not know."""
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
        elif typing.get_origin(kind) is dict and isinstance(raw[entry.name], dict):
            kinds = _by_kind(typing.get_args(typing.get_args(kind)[1]))
            result[entry.name] = {
                name: completed(kinds[group["kind"]], group) if group.get("kind") in kinds else group
                for name, group in raw[entry.name].items()
            }
    return result


def _by_kind(kinds: Any) -> dict[Any, Any]:
    return {dataclasses.fields(kind)[0].default: kind for kind in kinds}


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return [hint]


def build(cls: type[T], raw: Any, path: str) -> T:
    """A dataclass of nested plain values that hold each of its keys, and no other; else UserError."""
    if not isinstance(raw, dict):
        raise UserError(f"config key {path} must be a group of keys, got {raw!r}")
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in sorted(set(raw) ^ set(fields)):
        state = "unknown" if key in raw else "missing"
        raise UserError(f"config key {prefix}{key} is {state}; the keys here are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _checked(hints[key], raw[key], prefix + key) for key in fields})


def _checked(hint: Any, value: Any, path: str) -> Any:
    (kind,) = _alternatives(hint)
    if value is None and kind is not hint:
        return None
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)  # type: ignore[arg-type]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"config key {path} must be a group of named groups, got {value!r}")
        kinds = typing.get_args(typing.get_args(kind)[1])
        return {name: _one_of(kinds, entry, f"{path}.{name}") for name, entry in value.items()}
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"config key {path} must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config key {path} must be {kind.__name__}, got {value!r}")
    return value


def _one_of(kinds: Any, raw: Any, path: str) -> Any:
    """One of several dataclasses, by its `kind`."""
    by_name = _by_kind(kinds)
    name = raw["kind"] if isinstance(raw, dict) and "kind" in raw else None
    if name not in by_name:
        raise UserError(f"config key {path}.kind must be one of {', '.join(by_name)}, got {name!r}")
    return build(by_name[name], raw, path)
