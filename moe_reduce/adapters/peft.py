"""Adapters <-> the two files of PEFT: adapter_config.json and adapter_model.safetensors.

LoRA, rsLoRA and DoRA go in and out as such. SkeMA goes out as the LoRA that it is: lora_A = S_in and
lora_B = S_outᵀ·M, with r = α = k. Experts have no module of their own in transformers 5, so no file of PEFT names them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce import trees
from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import Adapter, check_fits, scale_of
from moe_reduce.adapters.targets import ATTENTION, Target, rank_of, targets_of, width_of
from moe_reduce.config import AdapterConfig, ModelConfig
from moe_reduce.errors import UserError
from moe_reduce.storage.names import TABLE
from moe_reduce.storage.tensors import TensorFiles, TensorItem, write_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the computation in a way that no adapter of ours has, and the only values that are read.
REQUIRED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
}
PARTS = {"lora_A.weight": "in/matrix", "lora_B.weight": "out/matrix", "lora_magnitude_vector": "magnitude"}


def can_say(adapter: Adapter, model: ModelConfig) -> bool:
    """Whether PEFT has names for what the adapter changes."""
    return all(target.experts is None for target in targets_of(adapter.config, model))


def write(adapter: Adapter, model: ModelConfig, directory: Path, base: str) -> None:
    """Writes the two files; base: what adapter_config.json calls the base model. Raises UserError for experts."""
    if not can_say(adapter, model):
        raise UserError("PEFT names no experts: merge the adapter, or leave gate, up and down out of its targets")
    items = sorted(_items(adapter, model), key=lambda item: item[0])
    write_file(directory / WEIGHTS_FILE, items)
    content = _config(adapter.config, model, base)
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _config(config: AdapterConfig, model: ModelConfig, base: str) -> dict[str, Any]:
    found = targets_of(config, model)
    skema = config.method == "skema"
    rank = width_of(config) if skema else rank_of(config)
    alpha = rank if skema else scale_of(config) * (rank**0.5 if config.method == "rslora" else rank)
    # a regular expression, since maps may be changed in layers of their own
    modules = "|".join(sorted(re.escape(name) for target in found for name in _modules(target)))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": f"({modules})",
        "use_rslora": config.method == "rslora",
        "use_dora": config.method == "dora",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _modules(target: Target) -> list[str]:
    """Names of the linear maps in transformers, one for each changed layer."""
    name = TABLE[target.path][0].removesuffix(".weight")
    return [name.format(layer=layer) for layer in target.layers or ()]


def _items(adapter: Adapter, model: ModelConfig) -> Iterator[TensorItem]:
    flat = trees.flatten(adapter.tree)
    for target in targets_of(adapter.config, model):
        below = f"{target.path}/"
        changes = {p.removeprefix(below): np.asarray(x) for p, x in flat.items() if p.startswith(below)}
        for place, module in enumerate(_modules(target)):
            one = {name: value[place] for name, value in changes.items() if name != "layer_numbers"}
            for part, array in _tensors(adapter.config, target, one).items():
                array = np.ascontiguousarray(array)
                yield f"{PREFIX}{module}.{part}", array.shape, array.dtype, array


def _tensors(config: AdapterConfig, target: Target, changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if config.method != "skema":
        return {
            part: changes[name].T if name != "magnitude" else changes[name]
            for part, name in PARTS.items()
            if name in changes
        }
    inward, outward = (
        projections.dense(_side(changes, side), size) for side, size in (("in", target.inputs), ("out", target.outputs))
    )
    core = changes["core"] if "core" in changes else changes["core_left"] @ changes["core_right"]
    lora_b = outward.T @ (core.astype(np.float64) * float(changes["scale"]))
    return {"lora_A.weight": inward.astype(np.float32), "lora_B.weight": lora_b.astype(np.float32)}


def _side(changes: dict[str, np.ndarray], side: str) -> dict[str, np.ndarray]:
    found = {name.removeprefix(f"{side}/"): leaf for name, leaf in changes.items() if name.startswith(f"{side}/")}
    return {"matrix": found["matrix"].T} if side == "in" and "matrix" in found else found


def read(directory: Path, model: ModelConfig) -> Adapter:
    """The adapter in a directory of PEFT. Raises UserError, naming key or tensor, for what we cannot compute."""
    raw = _read_config(directory)
    files = TensorFiles(directory, WEIGHTS_FILE)
    tensors = {_split(name, files.entries[name].file): files.read(name).astype(np.float32) for name in files.entries}
    by_path = _by_path(tensors, model, directory)
    rank = max(array.shape[0] for (_, part), array in tensors.items() if part == "lora_A.weight")
    words = [f"{_word(path)}@{'+'.join(map(str, layers))}" for path, layers in by_path.items()]
    method = "dora" if raw["use_dora"] else "rslora" if raw["use_rslora"] else "lora"
    config = AdapterConfig(method=method, targets=",".join(words), rank=rank, alpha=float(raw["lora_alpha"]))
    leaves: dict[str, Any] = {}
    for target in targets_of(config, model):
        modules = _modules(target)
        for part, name in PARTS.items():
            if (modules[0], part) in tensors:
                stacked = [_padded(tensors[module, part], part, rank) for module in modules]
                leaves[f"{target.path}/{name}"] = jnp.asarray(np.stack(stacked))
        scales = [_scale(raw, module, tensors[module, "lora_A.weight"].shape[0]) for module in modules]
        leaves[f"{target.path}/scale"] = jnp.asarray(scales, jnp.float32)
        leaves[f"{target.path}/layer_numbers"] = jnp.asarray(target.layers, jnp.int32)
        if method == "dora":
            leaves[f"{target.path}/present"] = jnp.ones((len(modules),), jnp.float32)
    adapter = Adapter(config, trees.unflatten(leaves))
    check_fits(adapter, model)
    return adapter


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
    if raw["use_dora"] and raw["use_rslora"]:
        raise UserError(f"{file}: use_dora with use_rslora is not supported, only one of them")
    return raw


def _split(name: str, file: Path) -> tuple[str, str]:
    """(module, part) of a tensor's name."""
    for part in PARTS:
        if name.startswith(PREFIX) and name.endswith(f".{part}"):
            return name.removeprefix(PREFIX).removesuffix(f".{part}"), part
    raise UserError(f"tensor {name} in {file} is no part of a LoRA: known are {', '.join(PARTS)}")


def _by_path(tensors: dict[tuple[str, str], np.ndarray], model: ModelConfig, directory: Path) -> dict[str, list[int]]:
    """Changed layers by leaf path; raises UserError for a module that the model does not have."""
    everything = AdapterConfig(targets="attention,mlp", rank=1)
    known = {
        module: (target.path, layer)
        for target in targets_of(everything, model)
        if target.experts is None
        for module, layer in zip(_modules(target), target.layers or (), strict=True)
    }
    found: dict[str, set[int]] = {}
    for module, part in tensors:
        if module not in known:
            raise UserError(f"{directory / WEIGHTS_FILE} changes {module}, which this model does not have as a matrix")
        for needed in ("lora_A.weight", "lora_B.weight"):
            if (module, needed) not in tensors:
                raise UserError(f"{directory / WEIGHTS_FILE} has {module}.{part} but no {needed}: fetch it again")
        path, layer = known[module]
        found.setdefault(path, set()).add(layer)
    if not found:
        raise UserError(f"{directory / WEIGHTS_FILE} holds no tensor: fetch it again")
    return {path: sorted(layers) for path, layers in sorted(found.items())}


def _word(path: str) -> str:
    leaf = path.rsplit("/", 1)[1]
    return {name: word for word, name in ATTENTION.items()}.get(leaf, leaf)


def _padded(array: np.ndarray, part: str, rank: int) -> np.ndarray:
    """Modules may differ in rank: zeros fill up, and change nothing."""
    if part == "lora_magnitude_vector":
        return array
    missing = rank - array.shape[0 if part == "lora_A.weight" else 1]
    axes = [(0, missing), (0, 0)] if part == "lora_A.weight" else [(0, 0), (0, missing)]
    return np.pad(array, axes).T


def _scale(raw: dict[str, Any], module: str, rank: int) -> float:
    """α/r or α/√r, with the module's own α if a pattern gives one."""
    alpha = raw["lora_alpha"]
    for pattern, value in (raw["alpha_pattern"] or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if raw["use_rslora"] else rank)
