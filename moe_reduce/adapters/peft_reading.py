"""Read PEFT's two files as an adapter: LoRA, rsLoRA and DoRA.

A LoRA of GPT-NeoX's query_key_value adapts all three matrices, each with a copy of its lora_A.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters.adapter import Adapter, check_fits
from moe_reduce.adapters.peft_modules import (
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PREFIX,
    WEIGHTS_FILE,
    Submatrix,
    modules_of,
    output_sizes,
)
from moe_reduce.adapters.targets import Target, targets_of, word_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.storage.tensors import TensorFiles

# Accepted values of keys for which PEFT has more. Other initialisations (PiSSA, OLoRA, ...) change the base as well.
REQUIRED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Keys that are read here, or have no effect on a trained adapter. Any other key must be off: None, False or empty.
KNOWN = {
    *REQUIRED_VALUES, "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "task_type",
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
SUFFIXES = (LORA_A, LORA_B, MAGNITUDE)
ALL_TARGETS = AdapterConfig(targets="attention,mlp", rank=1)
Tensors = Mapping[tuple[str, str], np.ndarray]  # by (module, suffix)


def read(directory: Path, model: ModelConfig) -> Adapter:
    """Read the adapter in a PEFT directory. Raises UserError, naming the key or tensor, for what is unsupported."""
    raw = _read_config(directory)
    files = TensorFiles(directory, WEIGHTS_FILE)
    tensors = {_split(name, files.entries[name].file): files.read(name).astype(np.float32) for name in files.entries}
    targets = _adapted(tensors, model, directory, raw["use_dora"])
    _check_output_sizes(tensors, model)
    rank = max(array.shape[0] for (_, suffix), array in tensors.items() if suffix == LORA_A)
    method = "dora" if raw["use_dora"] else "rslora" if raw["use_rslora"] else "lora"
    words = ",".join(map(word_of, targets))
    config = AdapterConfig(method=method, targets=words, rank=rank, alpha=float(raw["lora_alpha"]))
    found: dict[str, list[np.ndarray]] = {}
    for module, submatrices in modules_of(targets, model).items():
        for submatrix in submatrices:
            for name, value in _leaves(raw, tensors, module, submatrix, rank).items():
                found.setdefault(f"{submatrix.target.path}/{name}", []).append(value)
    leaves = {path: jnp.asarray(np.stack(values)) for path, values in found.items()}
    leaves |= {f"{target.path}/layer_numbers": jnp.asarray(target.layers, jnp.int32) for target in targets}
    adapter = Adapter(config, trees.unflatten(leaves))
    check_fits(adapter, model)
    return adapter


def _leaves(
    raw: dict[str, Any], tensors: Tensors, module: str, submatrix: Submatrix, rank: int
) -> dict[str, np.ndarray]:
    """Leaves of one matrix; modules of lower rank are padded with zeros, which leave ΔW unchanged."""
    lora_a, lora_b = tensors[module, LORA_A], tensors[module, LORA_B]
    missing = (0, rank - lora_a.shape[0])
    found = {
        "in/matrix": np.pad(lora_a, [missing, (0, 0)]).T,
        "out/matrix": np.pad(lora_b[submatrix.rows], [(0, 0), missing]).T,
        "scale": np.float32(_scale(raw, module, lora_a.shape[0])),
    }
    if raw["use_dora"]:
        found |= {"magnitude": tensors[module, MAGNITUDE][submatrix.rows], "present": np.float32(1)}
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
    """(module, suffix) of a tensor's name."""
    for suffix in SUFFIXES:
        if name.startswith(PREFIX) and name.endswith(f".{suffix}"):
            return name.removeprefix(PREFIX).removesuffix(f".{suffix}"), suffix
    raise UserError(f"tensor {name} in {file} is not part of a LoRA: known are {', '.join(SUFFIXES)}")


def _adapted(tensors: Tensors, model: ModelConfig, directory: Path, dora: bool) -> tuple[Target, ...]:
    """Targets that the tensors adapt. Raises UserError for unknown modules, and unexpected or missing tensors."""
    file, needed = directory / WEIGHTS_FILE, SUFFIXES if dora else SUFFIXES[:2]
    modules = modules_of(targets_of(ALL_TARGETS, model), model)
    layers: dict[str, set[int]] = {}
    for module, suffix in tensors:
        if module not in modules:
            raise UserError(f"{file} changes {module}, which this model does not have as a matrix")
        if suffix not in needed:
            raise UserError(f"{file} has {module}.{suffix}, but {CONFIG_FILE} says use_dora=false")
        for other in needed:
            if (module, other) not in tensors:
                raise UserError(f"{file} has {module}.{suffix} but no {other}: fetch it again")
        for submatrix in modules[module]:
            layers.setdefault(submatrix.target.path, set()).add(submatrix.layer)
    if not layers:
        raise UserError(f"{file} holds no tensor: fetch it again")
    targets = targets_of(ALL_TARGETS, model)
    return tuple(
        Target(target.parameter, tuple(sorted(layers[target.path]))) for target in targets if target.path in layers
    )


def _check_output_sizes(tensors: Tensors, model: ModelConfig) -> None:
    sizes = output_sizes(model)
    for (module, suffix), array in tensors.items():
        if suffix != LORA_A and array.shape[0] != sizes[module]:
            raise UserError(
                f"{module}.{suffix} has shape {array.shape}, this base needs {sizes[module]} rows: give the adapter of "
                "this base"
            )


def _scale(raw: dict[str, Any], module: str, rank: int) -> float:
    """α/r or α/√r, with the module's own α if a pattern gives one."""
    alpha = raw["lora_alpha"]
    for pattern, value in (raw["alpha_pattern"] or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if raw["use_rslora"] else rank)
