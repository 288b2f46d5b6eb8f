"""Pruning from file to file needs little memory, however large the quantised directory is."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_reduce.families import from_hf, parameter_layouts

ROOT = Path(__file__).resolve().parent.parent
GIGABYTES = float(os.environ.get("MOE_REDUCE_TEST_GIGABYTES", "3"))  # of the directory that is pruned
LIMIT = 0.5e9  # bytes above what pruning a small directory takes
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4, "F16": 2}
COMMON = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32_000,
    "max_position_embeddings": 4096, "num_experts_per_tok": 4, "tie_word_embeddings": True,
}  # fmt: skip
QWEN = COMMON | {"model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 128}
OSS = COMMON | {"model_type": "gpt_oss", "intermediate_size": 2880, "num_local_experts": 64, "attention_bias": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a tensor for each expert, FP8": (QWEN, FP8),
    "a tensor for each expert, GPTQ": (QWEN, GPTQ),
    "a tensor for all experts, MXFP4": (OSS, {"quant_method": "mxfp4"}),
}
Described = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name
RUN = """
import resource, sys
from moe_reduce.__main__ import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


def described(raw: dict[str, Any], stated: dict[str, Any]) -> Described:
    """The tensors of a quantised model."""
    found: Described = {}
    for leaf in parameter_layouts(from_hf(raw)):
        for name, shape in ((name, leaf.stored_shape) for name in leaf.names()):
            matrix = name.endswith("_proj.weight") or name.endswith(("gate_up_proj", "down_proj"))
            found |= dict(_parts(name, shape, stated["quant_method"])) if matrix else {name: ("BF16", shape)}
    return found


def _parts(name: str, shape: tuple[int, ...], method: str) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    module = name.removesuffix(".weight")
    if method == "fp8":
        yield name, ("F8_E4M3", shape)
        yield f"{name}_scale_inv", ("F32", tuple(-(-size // 128) for size in shape))
    elif method == "gptq":
        outputs, inputs = shape
        yield f"{module}.qweight", ("I32", (inputs // 8, outputs))
        yield f"{module}.qzeros", ("I32", (inputs // 128, outputs // 8))
        yield f"{module}.scales", ("F16", (inputs // 128, outputs))
    elif len(shape) == 3:  # stored [experts, inputs, outputs]; codes have the inputs last
        experts, inputs, outputs = shape
        yield f"{name}_blocks", ("U8", (experts, outputs, inputs // 32, 16))
        yield f"{name}_scales", ("U8", (experts, outputs, inputs // 32))
    else:
        yield name, ("BF16", shape)


def write_sparse(directory: Path, raw: dict[str, Any], stated: dict[str, Any], gigabytes: float) -> float:
    """Write a directory of at least this size, whose data are holes of its files; return its size in bytes."""
    size = {layers: _bytes(described(raw | {"num_hidden_layers": layers}, stated)) for layers in (1, 2)}
    layers = max(2, math.ceil((gigabytes * 1e9 - size[1]) / (size[2] - size[1])) + 1)
    raw = raw | {"num_hidden_layers": layers}
    tensors = described(raw, stated)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": stated}))
    shards: dict[str, Described] = {}
    for name, kind in tensors.items():
        number = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = kind
    for file, held in shards.items():
        _write_holes(directory / file, held)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    experts = raw.get("num_experts", raw.get("num_local_experts"))
    scores = {"tokens": 1, "counts": [[1] * experts] * layers, "scores": {"reap": [[*range(experts)]] * layers}}
    (directory / "scores.json").write_text(json.dumps(scores))
    return _bytes(tensors)


def _bytes(tensors: Described) -> int:
    return sum(SIZES[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def _write_holes(file: Path, tensors: Described) -> None:
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = position + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def peak_of_pruning(directory: Path) -> int:
    """Largest resident memory of a process that prunes half of the experts, in bytes."""
    out = directory.with_name("small")
    options = [f"--model={directory}", f"--scores={directory / 'scores.json'}", "--keep=0.5", f"--out={out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RUN, "prune", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(out)
    return int(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory_does_not_grow_with_the_directory(tmp_path: Path, kind: str):
    raw, stated = KINDS[kind]
    free = shutil.disk_usage(tmp_path).free
    if free < 2 * GIGABYTES * 1e9:
        pytest.skip(f"needs {2 * GIGABYTES:.0f} GB of free disk")
    tiny = raw | {"num_experts" if "num_experts" in raw else "num_local_experts": 8, "vocab_size": 256}
    write_sparse(tmp_path / "tiny", tiny, stated, 0)
    size = write_sparse(tmp_path / "large", raw, stated, GIGABYTES)
    baseline, peak = (peak_of_pruning(tmp_path / name) for name in ("tiny", "large"))
    print(f"{kind}: {size / 1e9:.1f} GB, peak {peak / 1e9:.2f} GB, {(peak - baseline) / 1e9:.2f} above the baseline")
    assert size >= GIGABYTES * 1e9
    assert peak - baseline < LIMIT
