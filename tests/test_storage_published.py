"""Quantised models as their makers publish them: FP8 of DeepSeek-V3, MXFP4 of gpt-oss."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from families_cases import tokens, written
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core.errors import UserError
from moe_reduce.models.weights import is_quantised
from moe_reduce.storage.tensors import SINGLE_FILE, TensorFiles

TOKENS_BT = tokens()
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MATRIX = re.compile(r".*(_proj|_proj_with_mqa)\.weight")


def fp8_directories(directory: Path) -> tuple[Path, Path]:
    """(a directory with FP8 matrices, one with the same values in fp32), of DeepSeek-V3."""
    quantised, whole = directory / "fp8", directory / "whole"
    written(quantised, "deepseek_v3", 0, hidden_size=136, moe_intermediate_size=130)  # blocks at the edge are smaller
    arrays, codes, values = safetensors.torch.load_file(quantised / SINGLE_FILE), {}, {}
    draw = np.random.default_rng(0)
    for name, array in arrays.items():
        if not MATRIX.fullmatch(name):
            codes[name] = values[name] = array
            continue
        blocks = [-(-size // 128) for size in array.shape]
        scales = torch.from_numpy(draw.uniform(0.001, 0.004, blocks).astype(np.float32))
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: array.shape[0], : array.shape[1]]
        codes[name] = (array / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        codes[f"{name}_scale_inv"] = scales
        values[name] = (codes[name].float() * spread).contiguous()
    whole.mkdir()
    safetensors.torch.save_file(values, whole / SINGLE_FILE)
    safetensors.torch.save_file(codes, quantised / SINGLE_FILE)
    raw = json.loads((quantised / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(raw))
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": FP8}))
    return quantised, whole


def mxfp4_directories(directory: Path) -> tuple[Path, Path]:
    """(a directory with experts in MXFP4, one with the values that transformers makes of them), of gpt-oss."""
    quantised, whole = directory / "mxfp4", directory / "whole"
    written(quantised, "gpt_oss", 0, hidden_size=64, intermediate_size=32)
    arrays = safetensors.torch.load_file(quantised / SINGLE_FILE)
    draw = np.random.default_rng(0)
    whole.mkdir()
    values, codes = dict(arrays), dict(arrays)
    for name, array in arrays.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = array.shape
        blocks = torch.from_numpy(draw.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8))
        scales = torch.from_numpy(draw.integers(122, 126, (experts, outputs, inputs // 32), dtype=np.uint8))
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        assert values[name].shape == array.shape
        del codes[name]
        codes |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    safetensors.torch.save_file(values, whole / SINGLE_FILE)
    safetensors.torch.save_file(codes, quantised / SINGLE_FILE)
    raw = json.loads((quantised / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(raw))
    stated: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": stated}))
    return quantised, whole


def quantised_paths(model: moe_reduce.Model) -> set[str]:
    from moe_reduce.core import trees

    return {path for path, value in trees.flatten(model.params).items() if is_quantised(value)}


@pytest.mark.parametrize("make", [fp8_directories, mxfp4_directories])
def test_logits_are_those_of_the_values(tmp_path: Path, make):
    quantised, whole = make(tmp_path)
    model = moe_reduce.load(quantised)
    paths = quantised_paths(model)
    assert {path.rsplit("/", 1)[-1] for path in paths} >= {"gate", "up", "down"}
    assert ("layers/attention/latent_up" in paths) == (make is fp8_directories)
    expected = np.asarray(moe_reduce.load(whole)(TOKENS_BT))
    np.testing.assert_allclose(model(TOKENS_BT), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("make", [fp8_directories, mxfp4_directories])
def test_pruning_copies_codes_and_scales_byte_for_byte(tmp_path: Path, make):
    quantised, whole = make(tmp_path)
    moe = moe_reduce.load(whole).config.moe
    assert moe is not None
    rows = [list(range(moe.experts))[::-1], list(range(moe.experts))]
    scores = {"tokens": 1, "counts": [[1] * moe.experts] * 2, "scores": {"reap": rows}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    arguments = [f"--scores={tmp_path / 'scores.json'}", f"--keep={moe.experts - 2}"]
    for source in (quantised, whole):
        assert main(["prune", f"--model={source}", *arguments, f"--out={source}-pruned"]) == 0
    small = moe_reduce.load(f"{quantised}-pruned")
    assert quantised_paths(small) == quantised_paths(moe_reduce.load(quantised))
    raw = json.loads(Path(f"{quantised}-pruned/config.json").read_text())
    assert raw["quantization_config"] == json.loads((quantised / "config.json").read_text())["quantization_config"]
    before, after = TensorFiles(quantised), TensorFiles(Path(f"{quantised}-pruned"))
    kept = [[index for _, index in row] for row in small.chain[-1].kept_experts or ()]
    for name in after.entries:
        layer, expert = (re.search(rf"{word}\.(\d+)\.", name) for word in ("layers", "experts"))
        if expert is not None:
            assert layer is not None
            there = kept[int(layer[1]) - small.config.dense_layers][int(expert[1])]
            wanted = before.read(name.replace(f".experts.{expert[1]}.", f".experts.{there}."))
        elif ".experts." in name:
            assert layer is not None
            wanted = before.read(name)[kept[int(layer[1])]]
        else:
            wanted = before.read(name)
        if ".mlp.gate." not in name and ".mlp.router." not in name:
            assert after.read(name).tobytes() == wanted.tobytes(), name
    kinds = {str(entry.dtype) for entry in after.entries.values()}
    assert kinds == {str(entry.dtype) for entry in before.entries.values()}
    expected = np.asarray(moe_reduce.load(f"{whole}-pruned")(TOKENS_BT))
    np.testing.assert_allclose(small(TOKENS_BT), expected, atol=1e-4 * np.abs(expected).max())


def test_scales_of_blocks_may_be_bf16(tmp_path: Path):
    """As in the FP8 files of Qwen3."""
    quantised, _ = fp8_directories(tmp_path)
    arrays = safetensors.torch.load_file(quantised / SINGLE_FILE)
    short = {name: array.bfloat16() for name, array in arrays.items() if name.endswith("_scale_inv")}
    safetensors.torch.save_file(arrays | short, quantised / SINGLE_FILE)
    down = moe_reduce.load(quantised).params["layers"]["experts"]["down"]
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    spread = short[f"{name}_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    values = arrays[name].float() * spread[: arrays[name].shape[0], : arrays[name].shape[1]]
    np.testing.assert_array_equal(np.asarray(down.dequantised())[0, 2].T, values)


def test_blocks_of_another_size_are_refused(tmp_path: Path):
    quantised, _ = fp8_directories(tmp_path)
    raw = json.loads((quantised / "config.json").read_text())
    raw["quantization_config"]["weight_block_size"] = [64, 64]
    (quantised / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"weight_block_size=\[64, 64\] in .* is not supported, only \[128, 128\]"):
        moe_reduce.load(quantised)


def test_missing_scales_are_named(tmp_path: Path):
    quantised, _ = mxfp4_directories(tmp_path)
    arrays = safetensors.torch.load_file(quantised / SINGLE_FILE)
    del arrays["model.layers.1.mlp.experts.down_proj_scales"]
    safetensors.torch.save_file(arrays, quantised / SINGLE_FILE)
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.mlp\.experts\.down_proj_scales"):
        moe_reduce.load(quantised)
