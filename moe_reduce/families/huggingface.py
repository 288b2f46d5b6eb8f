"""Families of transformers: config.json read and written by a table of keys."""

import dataclasses
import reprlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import rotary
from moe_reduce.families.family import CARRIED, Family
from moe_reduce.families.key import Key
from moe_reduce.families.neutral_keys import NEUTRAL

ROPE = {"rope_theta": "rope_theta"}
MOE = "moe."  # before the fields of MoEConfig
LAYER_TYPES = "layer_types"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceFamily(Family):
    """A family whose config.json transformers reads.

    Each key of a config.json is in one of these tables, or switched off (false, null, 0 or empty), or refused by name.
    What no table can say, a subclass says by `derive` and `derived`.

    keys: keys of config.json by field of ModelConfig; fields of MoEConfig have "moe." in front. A family without a key
    for them has as many key/value heads as query heads, and a head width of width / query heads. fixed: fields with one
    value in every model of the family, named in the same way. derived_keys: keys that `derive` reads. derived_names:
    which of them messages name for a field.
    defaults: values that transformers assumes for keys that a file leaves out. accepted: keys that change what a model
    computes, with the only values that the decoder supports; a key that `keys` reads is not checked against it, so a
    family supports one of common.ACCEPTED by reading it. constants: keys of a new file that no field gives. rope: key
    of published files -> name within `rope_parameters`, as transformers 5 writes it. neutral_rope: keys within
    `rope_parameters` that change nothing in this family. aliases: other spelling -> key.
    neutral: keys that change nothing in this family, beside those that never do (neutral_keys.py).
    """

    keys: Mapping[str, Key]
    defaults: Mapping[str, Any]
    accepted: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived_keys: Set[str] = frozenset()
    derived_names: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, str] = field(default_factory=lambda: ROPE)
    neutral_rope: Set[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    neutral: Set[str] = frozenset()

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that are not the value of one key, by their names in `keys`. flat: from `_flat`."""
        del flat
        return {}

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Values of `derived_keys` for a config, in the spelling of published files."""
        del config
        return {}

    def read(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json; UserError names a key that cannot be represented."""
        scaling = self._check(raw)
        flat = self._flat(raw)
        values = {name: key.value(flat) for name, key in self.keys.items()} | dict(self.fixed) | self.derive(flat)
        experts = {name.removeprefix(MOE): values.pop(name) for name in list(values) if name.startswith(MOE)}
        heads, width = values["query_heads"], values["width"]
        values.setdefault("key_value_heads", heads)
        if "head_width" not in values:
            if heads > 0 and width % heads:
                raise UserError(f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads})")
            values["head_width"] = width // max(heads, 1)
        moe = MoEConfig(**experts) if experts else None
        return ModelConfig(**values, moe=moe, rotary_scaling=scaling, family=self.name)

    def key_of(self, field: str) -> str:
        """Key of config.json that gives a field of ModelConfig, or of MoEConfig with "moe." in front."""
        return self.keys[field].name if field in self.keys else self.derived_names.get(field, field)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a new config.json."""
        values = self._values(config)
        raw = {key: value for key, value in values.items() if key not in self.rope}
        rope = {name: values[key] for key, name in self.rope.items()}
        raw |= {"rope_parameters": rotary.write(config.rotary_scaling) | rope}
        return raw | {"bos_token_id": None, "eos_token_id": None} | dict(self.constants)

    def update(self, raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """`raw` with the keys of changed fields replaced. Keys that it left out are added, as defaults may not fit."""
        flat, raw = self._flat(raw), dict(raw)
        groups = [name for name in rotary.GROUPS if raw.get(name)]
        for key, value in self._values(config).items():
            names = [name for name in (key, *self._spellings(key)) if name in raw]
            if not names and not (groups and key in self.rope):
                raw[key] = value
            if flat.get(key) == value:
                continue
            raw |= dict.fromkeys(names, value)
            if key in self.rope:
                raw |= {group: raw[group] | {self.rope[key]: value} for group in groups}
        if raw.get(LAYER_TYPES) is not None and LAYER_TYPES not in self.derived_keys:
            raw[LAYER_TYPES] = ["full_attention"] * config.layers
        return raw

    def represents(self, config: ModelConfig) -> bool:
        """True if writing the config and reading it back gives the same config."""
        if self._has_experts != (config.moe is not None):
            return False
        try:
            return self.same(self.read({"model_type": self.name} | self.write(config)), config)
        except UserError:
            return False

    def same(self, left: ModelConfig, right: ModelConfig) -> bool:
        """True if equal except for moe.init_scale, which no file of transformers holds."""
        if left.moe is not None and right.moe is not None:
            left = dataclasses.replace(left, moe=dataclasses.replace(left.moe, init_scale=right.moe.init_scale))
        return left == right

    @property
    def _has_experts(self) -> bool:
        return any(name.startswith(MOE) for name in self.keys)

    def published(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a config.json that the fields of a config give, in the spelling of published files."""
        return self._values(config)

    def _values(self, config: ModelConfig) -> dict[str, Any]:
        """Values of the fields under the keys of published files."""
        return {
            key.name: getattr(config.moe if name.startswith(MOE) else config, name.removeprefix(MOE))
            for name, key in self.keys.items()
        } | self.derived(config)

    def _flat(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The keys in the spelling of published files, with keys that are left out filled in as transformers does."""
        optional = {key.name for key in self.keys.values() if key.optional} | self.derived_keys
        given = {key: value for key, value in raw.items() if value is not None or key in optional}
        for key in (*self.rope, *self.aliases.values()):
            found = self._every_spelling(given, key)
            (first, value), *others = found.items() or [(key, None)]
            for other, another in others:
                if another != value:
                    raise UserError(f"{first}={value!r} and {other}={another!r} contradict each other: keep one")
            if found:
                given[key] = value
        flat = dict(self.defaults) | given
        heads, width = (self.keys[name].value(flat) for name in ("query_heads", "width"))
        return {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)} | flat

    def _spellings(self, key: str) -> list[str]:
        return [name for name, meant in self.aliases.items() if meant == key]

    def _every_spelling(self, given: Mapping[str, Any], key: str) -> dict[str, Any]:
        """The values that a config.json gives for a key, by where it gives them."""
        found = {name: given[name] for name in (key, *self._spellings(key)) if name in given}
        for group in rotary.GROUPS if key in self.rope else ():
            if self.rope[key] in given.get(group, {}):
                found[f"{group}.{self.rope[key]}"] = given[group][self.rope[key]]
        return found

    def _check(self, raw: Mapping[str, Any]) -> Any:
        """The rotary scaling; raises UserError for a key that is unknown, or says what the decoder does not compute."""
        read = {key.name for key in self.keys.values()} | self.derived_keys
        for key, accepted in self.accepted.items():
            if key in raw and key not in read and raw[key] not in accepted:
                raise UserError(f"{key}={raw[key]!r} is not supported, only {accepted[0]!r}")
        scaling = rotary.read(raw, {*self.rope.values(), *self.neutral_rope})
        types = None if LAYER_TYPES in read else raw.get(LAYER_TYPES)
        if types is not None and (not isinstance(types, list) or any(one != "full_attention" for one in types)):
            raise UserError(f"layer_types={types!r} is not supported, only 'full_attention' in every layer")
        for key in sorted(set(raw) - self.known_keys):
            if raw[key] and not key.startswith("_"):
                raise UserError(
                    f"{key}={reprlib.repr(raw[key])} is not supported in {self.name}: remove it if the model is the "
                    "same without it"
                )
        return scaling

    @property
    def known_keys(self) -> Set[str]:
        """Keys that are read, checked, or known to change nothing."""
        read = {key.name for key in self.keys.values()} | self.derived_keys
        read |= {*self.rope, *self.aliases, *rotary.GROUPS, LAYER_TYPES}
        return read | set(self.accepted) | set(CARRIED) | NEUTRAL | self.neutral
