"""Write an adapter as PEFT's two files: adapter_config.json and adapter_model.safetensors.

LoRA, rsLoRA and DoRA keep their form. SkeMA is written as an equivalent LoRA: lora_A = S_in and lora_B = S_outᵀ·M, with
r = α = K. If several matrices of one module are adapted, such as GPT-NeoX's queries and values, they become one LoRA of
their summed rank, in which each fills its own rows of lora_B. Adapters of experts and routers cannot be written: these
are no modules in transformers 5.
"""

import json
import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_reduce.adapters import projections
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.merging import delta_of
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
from moe_reduce.adapters.targets import Target, targets_of
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.storage.tensors import TensorItem, write_file


def representable(adapter: Adapter, model: ModelConfig) -> bool:
    """True if PEFT has names for everything that the adapter changes."""
    targets = targets_of(adapter.config, model)
    if any(target.experts is not None or target.router for target in targets):
        return False
    sizes = output_sizes(model)
    # DoRA in PEFT has a magnitude for every output of a module, so the adapter must cover all of them
    return adapter.config.method != "dora" or all(
        sum(len(submatrix.rows) for submatrix in submatrices) == sizes[module]
        for module, submatrices in modules_of(targets, model).items()
    )


def write(adapter: Adapter, model: ModelConfig, directory: Path, base: str) -> None:
    """Write the two files. base: name of the base in adapter_config.json. UserError for experts and routers."""
    if not representable(adapter, model):
        raise UserError("PEFT cannot represent some of these targets: merge the adapter instead")
    modules, sizes = modules_of(targets_of(adapter.config, model), model), output_sizes(model)
    tensors = {module: _tensors(adapter, submatrices, sizes[module]) for module, submatrices in modules.items()}
    items: list[TensorItem] = []
    for module in sorted(tensors):
        for suffix, array in sorted(tensors[module].items()):
            items.append((f"{PREFIX}{module}.{suffix}", array.shape, array.dtype, np.ascontiguousarray(array)))
    write_file(directory / WEIGHTS_FILE, items)
    ranks = {module: arrays[LORA_A].shape[0] for module, arrays in tensors.items()}
    scales = {module: _scale(adapter, submatrices[0]) for module, submatrices in modules.items()}
    content = _config(adapter.config, ranks, scales, base)
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _scale(adapter: Adapter, submatrix: Submatrix) -> float:
    """PEFT's scaling factor; SkeMA's is part of lora_B."""
    if adapter.config.method == "skema":
        return 1.0
    return float(np.asarray(delta_of(adapter, submatrix.target)["scale"])[submatrix.index])


def _config(config: AdapterConfig, ranks: dict[str, int], scales: dict[str, float], base: str) -> dict[str, Any]:
    first, modules = min(ranks), sorted(ranks)
    alphas = {module: scales[module] * (r**0.5 if config.method == "rslora" else r) for module, r in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        # a regular expression, because each module may be adapted in layers of its own
        "target_modules": f"({'|'.join(re.escape(module) for module in modules)})",
        "use_rslora": config.method == "rslora",
        "use_dora": config.method == "dora",
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {re.escape(module): ranks[module] for module in modules if ranks[module] != ranks[first]},
        "alpha_pattern": {re.escape(module): alphas[module] for module in modules if alphas[module] != alphas[first]},
    }


def _tensors(adapter: Adapter, submatrices: Sequence[Submatrix], outputs: int) -> dict[str, np.ndarray]:
    """Tensors of one module: the LoRAs of its adapted matrices, concatenated along the rank."""
    lora_a, lora_b, magnitude_O = [], [], np.zeros(outputs, np.float32)
    for submatrix in submatrices:
        stacked = jax.tree.map(np.asarray, delta_of(adapter, submatrix.target))
        delta = jax.tree.map(itemgetter(submatrix.index), stacked)
        a_KI, b_OK = _factors(adapter.config, submatrix.target, delta)
        lora_a.append(a_KI)
        rows_OK = np.zeros((outputs, b_OK.shape[1]), np.float32)
        rows_OK[submatrix.rows] = b_OK * np.float32(_scale(adapter, submatrix) / _scale(adapter, submatrices[0]))
        lora_b.append(rows_OK)
        if "magnitude" in delta:
            magnitude_O[submatrix.rows] = delta["magnitude"]
    found = {LORA_A: np.concatenate(lora_a), LORA_B: np.concatenate(lora_b, axis=1)}
    return found | ({MAGNITUDE: magnitude_O} if adapter.config.method == "dora" else {})


def _factors(config: AdapterConfig, target: Target, delta: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(lora_A [K, I], lora_B [O, K]) of one matrix."""
    inward, outward = delta["in"], delta["out"]
    if config.method != "skema":
        return inward["matrix"].T, outward["matrix"].T
    if "matrix" in inward:
        inward = {"matrix": inward["matrix"].T}
    in_KI = projections.dense(inward, target.in_features)
    out_KO = projections.dense(outward, target.out_features)
    core_KK = delta["core"] if "core" in delta else delta["core_left"] @ delta["core_right"]
    lora_b = out_KO.T @ (core_KK.astype(np.float64) * float(delta["scale"]))
    return in_KI.astype(np.float32), lora_b.astype(np.float32)
