"""Directories as AutoGPTQ, GPTQModel and AutoAWQ write them, packed value by value from the formats' definitions."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from transformers_models import written

SIZES = {
    "hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 61, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
MATRIX = re.compile(r"(.*_proj)\.weight")


def stated(method: str, **changes: Any) -> dict[str, Any]:
    """`quantization_config` of published files."""
    common = {"quant_method": method, "bits": 4, "group_size": 32}
    own: dict[str, Any] = {"desc_act": False, "sym": False, "damp_percent": 0.01, "checkpoint_format": "gptq"}
    if method == "awq":
        own = {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["gate"]}
    return common | own | changes


def packed(values: np.ndarray, bits: int, columns: tuple[int, ...] | None = None) -> np.ndarray:
    """Words int32 [rows, columns / n]: bits · i of a word hold the column `columns[i]` of its n."""
    count = 32 // bits
    words = np.zeros((len(values), values.shape[1] // count), np.uint32)
    for word in range(words.shape[1]):
        for place in range(count):
            column = word * count + (place if columns is None else columns[place])
            words[:, word] |= values[:, column].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def module(draw: Any, shape: tuple[int, int], config: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(tensors of a random module, its values [outputs, inputs]). shape: [outputs, inputs]."""
    outputs, inputs = shape
    bits, of_gptq = config["bits"], config["quant_method"] == "gptq"
    size = inputs if config["group_size"] == -1 else config["group_size"]
    group_of = np.arange(inputs, dtype=np.int32) // size
    if config.get("desc_act"):
        group_of = draw.permutation(group_of)
    codes = draw.integers(0, 2**bits, (inputs, outputs))
    zeros = draw.integers(1 if of_gptq else 0, 2**bits, (inputs // size, outputs))
    scales = draw.uniform(0.005, 0.05, zeros.shape).astype(np.float16)
    values = scales.astype(np.float32)[group_of] * (codes - zeros[group_of]).astype(np.float32)
    if not of_gptq:
        tensors = {"qweight": packed(codes, bits, AWQ_COLUMNS), "qzeros": packed(zeros, bits, AWQ_COLUMNS)}
        return tensors | {"scales": scales}, np.ascontiguousarray(values.T)
    less = 1 if config["checkpoint_format"] == "gptq" else 0
    tensors = {"qweight": np.ascontiguousarray(packed(codes.T, bits).T), "qzeros": packed(zeros - less, bits)}
    return tensors | {"scales": scales, "g_idx": group_of}, np.ascontiguousarray(values.T)


def directories(directory: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """(a quantised Qwen3-MoE, one with the same values in fp32). config: from `stated`."""
    quantised, whole = directory / "quantised", directory / "whole"
    written(quantised, "qwen3_moe", **SIZES)
    arrays = safetensors.numpy.load_file(quantised / "model.safetensors")
    coded, values, draw = {}, {}, np.random.default_rng(0)
    for name, array in arrays.items():
        found = MATRIX.fullmatch(name)
        if found is None:
            coded[name] = values[name] = array
            continue
        tensors, values[name] = module(draw, array.shape, config)
        coded |= {f"{found[1]}.{part}": tensor for part, tensor in tensors.items()}
    whole.mkdir()
    raw = json.loads((quantised / "config.json").read_text())
    for place, content, more in ((quantised, coded, {"quantization_config": config}), (whole, values, {})):
        safetensors.numpy.save_file(content, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(raw | more))
    return quantised, whole
