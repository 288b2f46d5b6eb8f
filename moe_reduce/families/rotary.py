"""Rotary scaling in a config.json: the groups `rope_scaling` of older files and `rope_parameters` of newer ones."""

from collections.abc import Iterable, Mapping
from typing import Any

from moe_reduce.core.attention_config import RotaryScaling
from moe_reduce.core.errors import UserError
from moe_reduce.families.key import Key

GROUPS = ("rope_scaling", "rope_parameters")
DEFAULT = "default"  # rope_type without scaling
FACTOR = {"factor": Key("factor", float)}
ORIGINAL = {"original_positions": Key("original_max_position_embeddings", int, optional=True)}
# rope_type -> key of the group by field of RotaryScaling
KINDS: Mapping[str, Mapping[str, Key]] = {
    "linear": FACTOR,
    "dynamic": FACTOR,
    "yarn": FACTOR
    | ORIGINAL
    | {
        "beta_fast": Key("beta_fast", float, optional=True),
        "beta_slow": Key("beta_slow", float, optional=True),
        "truncate": Key("truncate", bool, optional=True),
        "attention_factor": Key("attention_factor", float, optional=True),
        "mscale": Key("mscale", float, optional=True),
        "mscale_all_dim": Key("mscale_all_dim", float, optional=True),
    },
    "llama3": FACTOR
    | ORIGINAL
    | {
        "low_frequency_factor": Key("low_freq_factor", float),
        "high_frequency_factor": Key("high_freq_factor", float),
    },
}


def read(raw: Mapping[str, Any], also: Iterable[str]) -> RotaryScaling | None:
    """The scaling that a config.json describes; UserError names a key of a group that is not supported.

    also: other keys that a group may hold, which do not scale.
    """
    found = {name: _read(name, raw[name], set(also)) for name in GROUPS if raw.get(name) is not None}
    scaled = {name: scaling for name, scaling in found.items() if scaling is not None}
    if len(set(scaled.values())) > 1:
        raise UserError(f"{' and '.join(scaled)} describe two rotary scalings: keep one")
    return next(iter(scaled.values()), None)


def _read(group: str, rope: Any, also: set[str]) -> RotaryScaling | None:
    if not isinstance(rope, dict):
        raise UserError(f"{group} must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", DEFAULT))
    if kind not in (DEFAULT, *KINDS):  # a tuple, since a damaged file may hold a list here
        name = "rope_type" if "rope_type" in rope else "type"
        raise UserError(f"{group}.{name}={kind!r} is not supported, only {', '.join((DEFAULT, *KINDS))}")
    keys = KINDS.get(kind, {})
    known = {"rope_type", "type", *also} | {key.name for key in keys.values()}
    for name, value in rope.items():
        # a share of 1 is no partial rotation
        if name not in known and value is not None and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{group}.{name}={value!r} is not supported with rope_type {kind!r}")
    if kind == DEFAULT:
        return None
    try:
        values = {field: key.value(rope) for field, key in keys.items()}
    except UserError as error:
        raise UserError(f"{group}.{error}") from None
    return RotaryScaling(kind, **{field: value for field, value in values.items() if value is not None})


def write(scaling: RotaryScaling | None) -> dict[str, Any]:
    """The keys of a group `rope_parameters` that describe a scaling."""
    if scaling is None:
        return {"rope_type": DEFAULT}
    values = {key.name: getattr(scaling, field) for field, key in KINDS[scaling.kind].items()}
    return {"rope_type": scaling.kind} | {name: value for name, value in values.items() if value is not None}
