"""Adapters <-> the two files of PEFT: adapter_config.json and adapter_model.safetensors.

LoRA, rsLoRA and DoRA go in and out as such. SkeMA goes out as the LoRA that it is: lora_A = S_in and
lora_B = S_outᵀ·M, with r = α = k. Experts have no module of their own in transformers 5, so no file of PEFT names them.

Queries, keys and values of GPT-NeoX are one module of PEFT. What we adapt apart goes out as one LoRA of their summed
rank, each with rows of lora_B of its own; what comes in adapts all three, through one lora_A that each gets a copy of.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce import families
from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import Adapter, check_fits
from moe_reduce.adapters.targets import ATTENTION, Target, targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.storage.tensors import TensorFiles, TensorItem, write_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The only values that are read of keys with more. Other starts than these change the base as well (PiSSA, OLoRA, ...).
REQUIRED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Read here, or without a part in the computation of a trained adapter. Any other key must be off: None, False or empty.
KNOWN = {
    *REQUIRED_VALUES, "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "task_type",
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
EVERYTHING = AdapterConfig(targets="attention,mlp", rank=1)


@dataclass(frozen=True)
class Place:
    """One changed matrix: its target, the place among the target's layers, and the rows that it has of its module."""

    target: Target
    number: int  # of the layer, in the order of the target's
    rows: np.ndarray  # int [O], of the module's outputs


def can_say(adapter: Adapter, model: ModelConfig) -> bool:
    """Whether PEFT has names for what the adapter changes."""
    found = targets_of(adapter.config, model)
    if any(target.experts is not None for target in found):
        return False
    outputs = _outputs(model)
    # DoRA gives every output of a module a length, so none may be left out
    return adapter.config.method != "dora" or all(
        sum(len(place.rows) for place in places) == outputs[module] for module, places in _modules(found, model).items()
    )


def write(adapter: Adapter, model: ModelConfig, directory: Path, base: str) -> None:
    """Writes the two files; base: what adapter_config.json calls the base model. Raises UserError for experts."""
    if not can_say(adapter, model):
        raise UserError("PEFT has no name for some of these targets: merge the adapter instead")
    found = _modules(targets_of(adapter.config, model), model)
    outputs = _outputs(model)
    tensors = {module: _tensors(adapter, places, outputs[module]) for module, places in found.items()}
    items: list[TensorItem] = []
    for module in sorted(tensors):
        for part, array in sorted(tensors[module].items()):
            items.append((f"{PREFIX}{module}.{part}", array.shape, array.dtype, np.ascontiguousarray(array)))
    write_file(directory / WEIGHTS_FILE, items)
    ranks = {module: parts["lora_A.weight"].shape[0] for module, parts in tensors.items()}
    scales = {module: _scale_of(adapter, places[0]) for module, places in found.items()}
    content = _config(adapter.config, ranks, scales, base)
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _scale_of(adapter: Adapter, place: Place) -> float:
    """What PEFT multiplies with; that of SkeMA is part of lora_B."""
    if adapter.config.method == "skema":
        return 1.0
    return float(np.asarray(trees.flatten(adapter.tree)[f"{place.target.path}/scale"])[place.number])


def _config(config: AdapterConfig, ranks: dict[str, int], scales: dict[str, float], base: str) -> dict[str, Any]:
    first = min(ranks)
    rank = ranks[first]
    alphas = {module: scales[module] * (r**0.5 if config.method == "rslora" else r) for module, r in ranks.items()}
    others = sorted(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alphas[first],
        # a regular expression, since maps may be changed in layers of their own
        "target_modules": f"({'|'.join(re.escape(module) for module in sorted(ranks))})",
        "use_rslora": config.method == "rslora",
        "use_dora": config.method == "dora",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {re.escape(module): ranks[module] for module in others if ranks[module] != rank},
        "alpha_pattern": {re.escape(module): alphas[module] for module in others if alphas[module] != alphas[first]},
    }


def _outputs(model: ModelConfig) -> dict[str, int]:
    """Outputs of every module that a leaf of the model is (a part of)."""
    return {
        leaf.module(index): leaf.stored_shape[0]
        for leaf in families.leaves(model)
        if leaf.stored_shape
        for index in np.ndindex(leaf.stacked)
    }


def _modules(targets: Sequence[Target], model: ModelConfig) -> dict[str, list[Place]]:
    """Linear maps by their names in transformers, and what is changed of each."""
    by_path = families.by_path(model)
    found: dict[str, list[Place]] = {}
    for target in targets:
        if target.experts is not None:
            continue
        leaf = by_path[target.path]
        numbered = np.broadcast_to(np.arange(leaf.stored_shape[0])[:, None], leaf.stored_shape)
        rows = leaf.from_stored(numbered).reshape(target.inputs, target.outputs)[0]
        for number, layer in enumerate(target.layers or ()):
            found.setdefault(leaf.module((layer,)), []).append(Place(target, number, rows))
    return found


def _tensors(adapter: Adapter, places: Sequence[Place], outputs: int) -> dict[str, np.ndarray]:
    """The tensors of one module; of several changed parts, ranks one after the other."""
    flat = trees.flatten(adapter.tree)
    inward, outward, magnitude = [], [], np.zeros(outputs, np.float32)
    for place in places:
        below = f"{place.target.path}/"
        mine = {p.removeprefix(below): np.asarray(x) for p, x in flat.items() if p.startswith(below)}
        one = {name: value[place.number] for name, value in mine.items() if name != "layer_numbers"}
        lora_a, lora_b = _pair(adapter.config, place.target, one)
        inward.append(lora_a)
        spread = np.zeros((outputs, lora_b.shape[1]), np.float32)
        spread[place.rows] = lora_b * np.float32(_scale_of(adapter, place) / _scale_of(adapter, places[0]))
        outward.append(spread)
        if "magnitude" in one:
            magnitude[place.rows] = one["magnitude"]
    found = {"lora_A.weight": np.concatenate(inward), "lora_B.weight": np.concatenate(outward, axis=1)}
    return found | ({"lora_magnitude_vector": magnitude} if adapter.config.method == "dora" else {})


def _pair(config: AdapterConfig, target: Target, changes: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(lora_A [r, I], lora_B [O, r]) of one matrix."""
    if config.method != "skema":
        return changes["in/matrix"].T, changes["out/matrix"].T
    inward, outward = (
        projections.dense(_side(changes, side), size) for side, size in (("in", target.inputs), ("out", target.outputs))
    )
    core = changes["core"] if "core" in changes else changes["core_left"] @ changes["core_right"]
    lora_b = outward.T @ (core.astype(np.float64) * float(changes["scale"]))
    return inward.astype(np.float32), lora_b.astype(np.float32)


def _side(changes: dict[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    found = {name.removeprefix(f"{side}/"): leaf for name, leaf in changes.items() if name.startswith(f"{side}/")}
    return {"matrix": found["matrix"].T} if side == "in" and "matrix" in found else found


def read(directory: Path, model: ModelConfig) -> Adapter:
    """The adapter in a directory of PEFT. Raises UserError, naming key or tensor, for what we cannot compute."""
    raw = _read_config(directory)
    files = TensorFiles(directory, WEIGHTS_FILE)
    tensors = {_split(name, files.entries[name].file): files.read(name).astype(np.float32) for name in files.entries}
    modules = _modules(targets_of(EVERYTHING, model), model)
    by_path = _by_path(tensors, modules, directory, raw["use_dora"])
    rank = max(array.shape[0] for (_, part), array in tensors.items() if part == "lora_A.weight")
    words = [f"{_word(path)}@{'+'.join(map(str, layers))}" for path, layers in by_path.items()]
    method = "dora" if raw["use_dora"] else "rslora" if raw["use_rslora"] else "lora"
    config = AdapterConfig(method=method, targets=",".join(words), rank=rank, alpha=float(raw["lora_alpha"]))
    found: dict[str, Any] = {}
    outputs = _outputs(model)
    for module, places in _modules(targets_of(config, model), model).items():
        for part in PARTS[1:]:
            if (module, part) in tensors and tensors[module, part].shape[0] != outputs[module]:
                shape = tensors[module, part].shape
                raise UserError(
                    f"{module}.{part} has shape {shape}, this base needs {outputs[module]} rows: give its own"
                )
        for place in places:
            for name, value in _changes(raw, tensors, module, place, rank).items():
                found.setdefault(f"{place.target.path}/{name}", []).append(value)
    stacked = {path: jnp.asarray(np.stack(values)) for path, values in found.items()}
    numbers = {
        f"{target.path}/layer_numbers": jnp.asarray(target.layers, jnp.int32) for target in targets_of(config, model)
    }
    adapter = Adapter(config, trees.unflatten(stacked | numbers))
    check_fits(adapter, model)
    return adapter


def _changes(
    raw: dict[str, Any], tensors: dict[tuple[str, str], np.ndarray], module: str, place: Place, rank: int
) -> dict[str, np.ndarray]:
    """The leaves of one matrix; of modules of a lower rank, zeros fill up and change nothing."""
    lora_a, lora_b = tensors[module, "lora_A.weight"], tensors[module, "lora_B.weight"]
    missing = (0, rank - lora_a.shape[0])
    found = {
        "in/matrix": np.pad(lora_a, [missing, (0, 0)]).T,
        "out/matrix": np.pad(lora_b[place.rows], [(0, 0), missing]).T,
        "scale": np.float32(_scale(raw, module, lora_a.shape[0])),
    }
    if raw["use_dora"]:
        found |= {"magnitude": tensors[module, "lora_magnitude_vector"][place.rows], "present": np.float32(1)}
    return found


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}: give a directory that PEFT or adapt wrote")
    try:
        raw = json.loads(file.read_text())
        raw = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}} | raw
        missing = {"r", "lora_alpha", "peft_type"} - set(raw)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not a JSON object ({error}): fetch it again") from None
    if missing:
        raise UserError(f"{file} has no {min(missing)}: fetch it again")
    for key, accepted in REQUIRED_VALUES.items():
        if key in raw and raw[key] not in accepted:
            raise UserError(f"{file}: {key}={raw[key]!r} is not supported, only {accepted[0]!r}")
    for key in sorted(set(raw) - KNOWN):
        if raw[key]:
            raise UserError(f"{file}: {key}={raw[key]!r} is not supported: merge the adapter with PEFT")
    numbers = [raw["lora_alpha"], *(raw["alpha_pattern"] or {}).values()]
    if not all(type(value) in (int, float) for value in numbers):
        raise UserError(f"{file}: lora_alpha and alpha_pattern must hold numbers, got {numbers}")
    if raw["use_dora"] and raw["use_rslora"]:
        raise UserError(f"{file}: use_dora with use_rslora is not supported, only one of them")
    return raw


def _split(name: str, file: Path) -> tuple[str, str]:
    """(module, part) of a tensor's name."""
    for part in PARTS:
        if name.startswith(PREFIX) and name.endswith(f".{part}"):
            return name.removeprefix(PREFIX).removesuffix(f".{part}"), part
    raise UserError(f"tensor {name} in {file} is no part of a LoRA: known are {', '.join(PARTS)}")


def _by_path(
    tensors: dict[tuple[str, str], np.ndarray], modules: dict[str, list[Place]], directory: Path, dora: bool
) -> dict[str, list[int]]:
    """Changed layers by leaf path; raises UserError for a module that the model does not have."""
    needed = PARTS if dora else PARTS[:2]
    found: dict[str, set[int]] = {}
    for module, part in tensors:
        if module not in modules:
            raise UserError(f"{directory / WEIGHTS_FILE} changes {module}, which this model does not have as a matrix")
        if part not in needed:
            raise UserError(f"{directory / WEIGHTS_FILE} has {module}.{part}, but {CONFIG_FILE} says use_dora=false")
        for other in needed:
            if (module, other) not in tensors:
                raise UserError(f"{directory / WEIGHTS_FILE} has {module}.{part} but no {other}: fetch it again")
        for place in modules[module]:
            assert place.target.layers is not None
            found.setdefault(place.target.path, set()).add(place.target.layers[place.number])
    if not found:
        raise UserError(f"{directory / WEIGHTS_FILE} holds no tensor: fetch it again")
    return {path: sorted(layers) for path, layers in sorted(found.items())}


def _word(path: str) -> str:
    leaf = path.rsplit("/", 1)[1]
    return {name: word for word, name in ATTENTION.items()}.get(leaf, leaf)


def _scale(raw: dict[str, Any], module: str, rank: int) -> float:
    """α/r or α/√r, with the module's own α if a pattern gives one."""
    alpha = raw["lora_alpha"]
    for pattern, value in (raw["alpha_pattern"] or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if raw["use_rslora"] else rank)
