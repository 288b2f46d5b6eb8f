"""adapter_config.json of PEFT's LoRA: every key is used, checked to be off, or known to change no trained adapter."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_reduce.adapters.peft_modules import CONFIG_FILE
from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError
from moe_reduce.core.expressions import Expressions
from moe_reduce.core.expressions import check as check_expressions

# Keys that are read here, with the values that a file without them has.
USED: Mapping[str, Any] = {
    "r": None, "lora_alpha": None, "use_rslora": False, "use_dora": False, "rank_pattern": None, "alpha_pattern": None,
    "target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    "bias": "none", "modules_to_save": None,
}  # fmt: skip
# Keys of which only some values can be computed.
ACCEPTED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION", None),
    "bias": ("none", "all", "lora_only", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Keys that describe how an adapter was made or trained, and change nothing once it is.
NEUTRAL = {
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "runtime_config",
    # of features that other keys switch on
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
REASONS = {
    "init_lora_weights": "it changes the base's weights as well, so convert the adapter with PEFT's save_pretrained"
    "(path_initial_model_for_weight_conversion=...), or merge it with PEFT",
}
ALL_LINEAR = "all-linear"
LARGEST = 2**31  # of r and lora_alpha
# Expressions as PEFT completes them: for a module by the end of its name, and for the layer that a module is in.
SUFFIX = r"(.*\.)?({})$"
IN_LAYER = r"(?:^|.*?\.){}\.(?P<number>\d+)\."
LAYER = r".*?\.[^.]*\.(?P<number>\d+)\."


@dataclass(frozen=True)
class PeftConfig:
    """The keys of USED, of valid types, and the file that they come from."""

    file: Path
    values: Mapping[str, Any]

    @functools.cached_property
    def _expressions(self) -> Expressions:
        return Expressions(self.file)

    @property
    def method(self) -> Literal["lora", "rslora", "dora"]:
        """Method by our name: lora, rslora or dora."""
        return "dora" if self.values["use_dora"] else "rslora" if self.values["use_rslora"] else "lora"

    @property
    def alpha(self) -> float:
        """α of modules without one of their own."""
        return float(self.values["lora_alpha"])

    def targets(self, module: str) -> bool:
        """True if target_modules, exclude_modules and the keys of layers select a module, as PEFT selects it."""
        wanted, excluded = self.values["target_modules"], self.values["exclude_modules"]
        if excluded and self._selected(excluded, module):
            return False
        if isinstance(wanted, str):
            return self.all_linear or self._selected(wanted, module)
        return self._selected(wanted, module) and self._in_layers(module)

    @property
    def all_linear(self) -> bool:
        """True where target_modules says all linear maps, without their names."""
        wanted = self.values["target_modules"]
        return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR

    def saves(self, module: str) -> bool:
        """True if modules_to_save names a module, or one that holds it."""
        return any(f".{name}." in f".{module}." for name in self.values["modules_to_save"] or ())

    def rank(self, module: str) -> int:
        """The module's own r if a pattern gives one, else that of all."""
        return int(self._by_pattern(self.values["rank_pattern"], module, self.values["r"]))

    def scale(self, module: str) -> float:
        """Factor of ΔW: α/r, or α/√r for rsLoRA, with the module's own α and r if patterns give them."""
        rank = self.rank(module)
        alpha = self._by_pattern(self.values["alpha_pattern"], module, self.values["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.values["use_rslora"] else rank)

    def _in_layers(self, module: str) -> bool:
        layers, patterns = self.values["layers_to_transform"], self.values["layers_pattern"] or []
        if layers is None or layers == []:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [self._expressions.match(IN_LAYER.format(pattern), module) for pattern in patterns]
        match = next(filter(None, found), None) if patterns else self._expressions.match(LAYER, module)
        return match is not None and int(match["number"]) in ([layers] if isinstance(layers, int) else layers)

    def _selected(self, wanted: str | list[str], module: str) -> bool:
        if isinstance(wanted, str):
            return self._expressions.fullmatch(wanted, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _by_pattern(self, patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
        """Value of the first pattern that matches the end of a module's name."""
        for pattern, value in (patterns or {}).items():
            if self._expressions.match(SUFFIX.format(pattern), module):
                return value
        return default


def read(directory: Path) -> PeftConfig:
    """Read adapter_config.json. UserError names a key that is missing, ill-typed or cannot be computed."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}: give a directory that PEFT or adapt wrote")
    raw = json_files.read_object(file)
    try:
        _check_accepted(raw)
        values = dict(USED) | {key: raw[key] for key in USED if raw.get(key) is not None}
        _check_numbers(values)
        _check_selection(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return PeftConfig(file, values)


def _check_accepted(raw: Mapping[str, Any]) -> None:
    for key in ("r", "lora_alpha", "peft_type", "target_modules"):
        if raw.get(key) is None:
            raise UserError(f"{key} is missing: fetch the file again, or add it")
    for key, accepted in ACCEPTED.items():
        if key in raw and raw[key] not in accepted:
            reason = REASONS.get(key, f"only {', '.join(repr(value) for value in accepted if value is not None)}")
            raise UserError(f"{key}={raw[key]!r} is not supported: {reason}")
    for key in sorted(set(raw) - set(USED) - set(ACCEPTED) - NEUTRAL):
        if raw[key]:
            raise UserError(f"{key}={raw[key]!r} is not supported: merge the adapter with PEFT")


def _check_numbers(values: Mapping[str, Any]) -> None:
    for key in ("use_rslora", "use_dora"):
        if type(values[key]) is not bool:
            raise UserError(f"{key} must be true or false, got {values[key]!r}")
    if values["use_dora"] and values["use_rslora"]:
        raise UserError("use_dora with use_rslora is not supported, only one of them")
    for key, pattern, kinds, what in (
        ("r", "rank_pattern", (int,), "whole numbers"),
        ("lora_alpha", "alpha_pattern", (int, float), "numbers"),
    ):
        own = {} if values[pattern] is None else values[pattern]
        if not isinstance(own, dict):
            raise UserError(f"{pattern} must be an object, got {own!r}")
        found = [values[key], *own.values()]
        if not all(type(value) in kinds and 0 < value < LARGEST for value in found):
            raise UserError(f"{key} and {pattern} must hold {what} above 0, got {found}")
        check_expressions(pattern, own, SUFFIX)


def _check_selection(values: Mapping[str, Any]) -> None:
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = values[key]
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{key} must be a list of names or one regular expression, got {value!r}")
        if key == "layers_pattern":
            check_expressions(key, names, IN_LAYER)
        elif isinstance(value, str) and key != "modules_to_save":
            check_expressions(key, names)
    if isinstance(values["modules_to_save"], str):
        raise UserError(f"modules_to_save must be a list of names, got {values['modules_to_save']!r}")
    layers = values["layers_to_transform"]
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(number) is int for number in numbers):
        raise UserError(f"layers_to_transform must hold layer numbers, got {layers!r}")
    if isinstance(values["target_modules"], str) and layers is not None:
        raise UserError("layers_to_transform is for target_modules that is a list of names: leave one of them out")
    if values["layers_pattern"] and layers is None:
        raise UserError("layers_pattern needs layers_to_transform: leave it out")
