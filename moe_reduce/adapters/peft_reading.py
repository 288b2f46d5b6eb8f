"""Read PEFT's two files as an adapter: LoRA, rsLoRA and DoRA.

A LoRA of GPT-NeoX's query_key_value adapts all three matrices, each with a copy of its lora_A. Experts that a file
leaves out, in a layer of which it adapts others, get ΔW = 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import peft_config, peft_whole
from moe_reduce.adapters.adapter import Adapter, check_fits
from moe_reduce.adapters.peft_config import PeftConfig
from moe_reduce.adapters.peft_modules import (
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PREFIX,
    WEIGHTS_FILE,
    Submatrix,
    modules_of,
    output_sizes,
)
from moe_reduce.adapters.targets import Target, every_target, word_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.storage.parameter_tensors import check_weight
from moe_reduce.storage.tensors import TensorFiles

SUFFIXES = (LORA_A, LORA_B, MAGNITUDE)
PICKLE = "adapter_model.bin"
# Endings of tensors that PEFT writes for what is not supported, and what they are.
UNSUPPORTED = {
    "lora_embedding_A": "a LoRA of the token embedding",
    "lora_embedding_B": "a LoRA of the token embedding",
    "lora_B.bias": "a bias of lora_B",
}
Tensors = Mapping[tuple[str, str], np.ndarray]  # by (module, suffix)
Modules = Mapping[str, Sequence[Submatrix]]


def read(directory: Path, model: ModelConfig) -> Adapter:
    """Read the adapter in a PEFT directory. Raises UserError, naming the key or tensor, for what is unsupported."""
    config = peft_config.read(directory)
    tensors, whole = _read_tensors(directory)
    modules = modules_of(every_target(model), model)
    _check_modules(config, tensors, model, directory / WEIGHTS_FILE)
    _check_shapes(config, tensors, modules, model)
    targets = _adapted(tensors, modules, model)
    rank = max(array.shape[0] for (_, suffix), array in tensors.items() if suffix == LORA_A)
    words = ",".join(map(word_of, targets))
    found = AdapterConfig(method=config.method, targets=words, rank=rank, alpha=config.alpha)
    leaves = {}
    for target in targets:
        for name, value in _leaves(config, tensors, target, modules_of([target], model), rank).items():
            leaves[f"{target.path}/{name}"] = jnp.asarray(value)
    adapter = Adapter(found, trees.unflatten(leaves), peft_whole.read(config, whole, model, directory / WEIGHTS_FILE))
    check_fits(adapter, model)
    return adapter


def _read_tensors(directory: Path) -> tuple[Tensors, dict[str, np.ndarray]]:
    """(tensors of LoRAs, all others by name) in fp32. UserError for one that is no float, empty or not finite."""
    if (directory / PICKLE).is_file() and not (directory / WEIGHTS_FILE).is_file():
        raise UserError(f"{directory} has {PICKLE}, a pickle, which can run code: save it with PEFT as safetensors")
    files = TensorFiles(directory, WEIGHTS_FILE)
    if not files.entries:
        raise UserError(f"{directory / WEIGHTS_FILE} holds no tensor: fetch it again")
    found: dict[tuple[str, str], np.ndarray] = {}
    whole: dict[str, np.ndarray] = {}
    for name, entry in files.entries.items():
        place = _split(name, entry.file)
        check_weight(name, entry)
        if 0 in entry.shape:
            raise UserError(
                f"tensor {name} in {entry.file} is empty (shape {entry.shape}), as when it is saved without gathering "
                "it from all devices (DeepSpeed ZeRO-3): save it again"
            )
        value = files.read(name).astype(np.float32)
        if not np.all(np.isfinite(value)):
            raise UserError(f"tensor {name} in {entry.file} has values that are not finite: train or fetch it again")
        if place is None:
            whole[name] = value
        else:
            found[place] = value
    if not found:
        raise UserError(f"{directory / WEIGHTS_FILE} holds no LoRA: fetch it again, or merge it with PEFT")
    return found, whole


def _split(name: str, file: Path) -> tuple[str, str] | None:
    """(module, suffix) of a tensor's name; None for a whole tensor of the model. UserError for any other."""
    for suffix in SUFFIXES:
        if name.startswith(PREFIX) and name.endswith(f".{suffix}"):
            return name.removeprefix(PREFIX).removesuffix(f".{suffix}"), suffix
    for suffix, what in UNSUPPORTED.items():
        if name.endswith(f".{suffix}"):
            raise UserError(f"tensor {name} in {file} is {what}, which is not supported: merge the adapter with PEFT")
    if name.startswith(PREFIX) and ".lora_" not in name:
        return None
    raise UserError(f"tensor {name} in {file} is not part of a LoRA: known are {', '.join(SUFFIXES)}")


def _check_modules(config: PeftConfig, tensors: Tensors, model: ModelConfig, file: Path) -> None:
    """Raise UserError unless the file holds exactly the tensors of the modules that its config targets."""
    modules, needed = modules_of(every_target(model), model), SUFFIXES if config.method == "dora" else SUFFIXES[:2]
    for module, suffix in tensors:
        if module not in modules:
            raise UserError(f"{file} changes {module}, which {_absence(module, model)}")
        if suffix not in needed:
            raise UserError(f"{file} has {module}.{suffix}, but {config.file.name} says use_dora=false: correct it")
        if not config.targets(module):
            raise UserError(
                f"{file} changes {module}, which target_modules in {config.file.name} does not cover: correct one"
            )
        if config.method == "dora" and modules[module][0].expert is not None:
            raise UserError(f"{config.file}: use_dora=true is not supported for experts ({module}): merge it with PEFT")
        for other in needed:
            if (module, other) not in tensors:
                raise UserError(f"{file} has {module}.{suffix} but no {other}: fetch it again")
    for module, (first, *_) in modules.items():
        # with transformers 5, experts and routers are no linear maps
        optional = config.all_linear and (first.expert is not None or first.target.router)
        if config.targets(module) and not optional and (module, LORA_A) not in tensors:
            raise UserError(
                f"{file} has no tensor of {module}, which target_modules in {config.file.name} covers: fetch it again"
            )


def _absence(module: str, model: ModelConfig) -> str:
    """Reason why a module cannot be adapted, and the remedy."""
    if module in output_sizes(model):
        return "is not supported in an adapter: merge it with PEFT"
    return "this model does not have as a matrix: give its own base"


def _check_shapes(config: PeftConfig, tensors: Tensors, modules: Modules, model: ModelConfig) -> None:
    sizes = output_sizes(model)
    for (module, suffix), array in tensors.items():
        rank, inputs = config.rank(module), modules[module][0].target.in_features
        if suffix == LORA_A and array.ndim == 2 and array.shape[0] != rank:
            raise UserError(
                f"{module}.{suffix} has rank {array.shape[0]}, r or rank_pattern in {config.file} says {rank}: fix one"
            )
        wanted = {LORA_A: (rank, inputs), LORA_B: (sizes[module], rank), MAGNITUDE: (sizes[module],)}[suffix]
        if array.shape != wanted:
            raise UserError(
                f"{module}.{suffix} has shape {array.shape}, this base needs {wanted}: give the adapter of this base"
            )


def _adapted(tensors: Tensors, modules: Modules, model: ModelConfig) -> tuple[Target, ...]:
    """Targets that the tensors adapt, in the layers in which they do."""
    layers: dict[str, set[int]] = {}
    for module, _ in tensors:
        for submatrix in modules[module]:
            layers.setdefault(submatrix.target.path, set()).add(submatrix.layer)
    return tuple(
        Target(target.parameter, tuple(sorted(layers[target.path])))
        for target in every_target(model)
        if target.path in layers
    )


def _leaves(config: PeftConfig, tensors: Tensors, target: Target, modules: Modules, rank: int) -> dict[str, np.ndarray]:
    """Leaves of one target, stacked over its layers; a module of a lower rank is padded with zeros.

    The scale is one for a layer: experts of another scale have the ratio in `out`.
    """
    assert target.layers is not None
    axes = () if target.experts is None else (target.experts,)
    layers = len(target.layers)
    in_matrix = np.zeros((layers, *axes, target.in_features, rank), np.float32)
    out_matrix = np.zeros((layers, *axes, rank, target.out_features), np.float32)
    scales, magnitudes = np.zeros(layers, np.float32), np.zeros((layers, target.out_features), np.float32)
    for module, submatrices in modules.items():
        for submatrix in submatrices if (module, LORA_A) in tensors else ():
            place = (submatrix.index,) if submatrix.expert is None else (submatrix.index, submatrix.expert)
            own, scale = tensors[module, LORA_A].shape[0], np.float32(config.scale(module))
            scales[submatrix.index] = scales[submatrix.index] or scale
            in_matrix[place][:, :own] = tensors[module, LORA_A].T
            out_matrix[place][:own] = tensors[module, LORA_B][submatrix.rows].T
            if scale != scales[submatrix.index]:
                out_matrix[place] *= scale / scales[submatrix.index]
            if config.method == "dora":
                magnitudes[submatrix.index] = tensors[module, MAGNITUDE][submatrix.rows]
    found = {"in/matrix": in_matrix, "out/matrix": out_matrix, "scale": scales}
    if config.method == "dora":
        found |= {"magnitude": magnitudes, "present": np.ones(layers, np.float32)}
    return found | {"layer_numbers": np.asarray(target.layers, np.int32)}
