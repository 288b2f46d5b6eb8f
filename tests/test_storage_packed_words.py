"""GPTQ and AWQ directories: values by the formats' definitions, pruned byte for byte, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from packed_models import directories, stated

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.models.weights import dequantised, is_quantised
from moe_reduce.storage.packed_words import AWQ_ORDER, Words
from moe_reduce.storage.tensors import SINGLE_FILE, TensorFiles

TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)
KINDS = {
    "gptq": (stated("gptq"), "int4-affine-g32"),
    "gptq, 8 bits": (stated("gptq", bits=8), "int8-affine-g32"),
    "gptq, whole columns": (stated("gptq", group_size=-1), "int4-affine-channel"),
    "gptq, version 2": (stated("gptq", checkpoint_format="gptq_v2"), "int4-affine-g32"),
    "awq": (stated("awq"), "int4-affine-g32"),
    "awq, whole columns": (stated("awq", group_size=-1), "int4-affine-channel"),
}


def quantised_params(model: moe_reduce.Model) -> dict[str, Any]:
    return {path: value for path, value in trees.flatten(model.params).items() if is_quantised(value)}


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_definition(tmp_path: Path, kind: str):
    config, scheme = KINDS[kind]
    quantised, whole = directories(tmp_path, config)
    model, plain = moe_reduce.load(quantised), moe_reduce.load(whole)
    moe_reduce.save(model, tmp_path / "saved")
    for loaded in (model, moe_reduce.load(tmp_path / "saved")):
        found = quantised_params(loaded)
        assert len(found) == 7
        for path, value in found.items():
            assert str(value.scheme) == scheme
            wanted = trees.flatten(plain.params)[path]
            np.testing.assert_array_equal(dequantised(value, np.float32), wanted, err_msg=path)
    if kind in ("gptq", "awq"):
        wanted = np.asarray(plain(TOKENS_BT))
        np.testing.assert_allclose(model(TOKENS_BT), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("ordered", [False, True])
def test_packing_is_the_inverse_of_unpacking(bits: int, axis: int, ordered: bool):
    if ordered and bits == 8:
        return
    words = Words(bits, axis, AWQ_ORDER if ordered else None)
    given = np.random.default_rng(0).integers(-(2**31), 2**31, (6, 5)).astype(np.int32)
    values = words.unpack(given)
    assert values.shape[axis] == given.shape[axis] * words.count
    np.testing.assert_array_equal(words.pack(values), given)


def prune(directory: Path, out: Path, keep: int = 2) -> None:
    scores = {"tokens": 1, "counts": [[1] * 4] * 2, "scores": {"reap": [[3, 2, 1, 0], [0, 1, 2, 3]]}}
    (directory / "scores.json").write_text(json.dumps(scores))
    options = [f"--scores={directory / 'scores.json'}", f"--keep={keep}"]
    assert main(["prune", f"--model={directory}", *options, f"--out={out}"]) == 0


@pytest.mark.parametrize("config", [stated("gptq", desc_act=True), stated("awq")], ids=["gptq, act-order", "awq"])
def test_pruning_copies_words_and_scales_byte_for_byte(tmp_path: Path, config: dict[str, Any]):
    quantised, _ = directories(tmp_path, config)
    prune(quantised, tmp_path / "small")
    assert json.loads((tmp_path / "small/config.json").read_text())["quantization_config"] == config
    before, after = TensorFiles(quantised), TensorFiles(tmp_path / "small")
    kept = ([0, 1], [2, 3])
    experts = 0
    for name in after.entries:
        found = re.fullmatch(r"(.*layers\.(\d)\.mlp\.experts\.)(\d)(\..*)", name)
        there = name if found is None else f"{found[1]}{kept[int(found[2])][int(found[3])]}{found[4]}"
        experts += found is not None
        if not name.endswith("mlp.gate.weight"):
            assert after.read(name).tobytes() == before.read(there).tobytes(), name
    assert experts == 2 * 2 * 3 * (4 if config["quant_method"] == "gptq" else 3)
    if config["quant_method"] == "awq":
        model = moe_reduce.load(tmp_path / "small")
        assert np.isfinite(np.asarray(model(TOKENS_BT))).all()


def rewrite(directory: Path, change: Any) -> None:
    """Change the tensors of a directory by a function."""
    arrays = safetensors.numpy.load_file(directory / SINGLE_FILE)
    change(arrays)
    safetensors.numpy.save_file(arrays, directory / SINGLE_FILE, {"format": "pt"})


def one_line(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        moe_reduce.load(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


Q = "model.layers.1.self_attn.q_proj"
MISTAKES = {
    "bits": (stated("gptq"), {"bits": 3}, "bits=3 of gptq in .* is not supported, only 4 and 8"),
    "awq bits": (stated("awq"), {"bits": 8}, "bits=8 of awq in .* is not supported, only 4"),
    "other bits": (stated("gptq"), {"bits": 8}, "has shape .*, config.json says"),
    "groups": (stated("gptq"), {"group_size": 16}, "group_size=16 of gptq in .* is not supported, only -1 and 32"),
    "uneven groups": (stated("gptq"), {"group_size": 128}, "has 64 inputs in groups of 128"),
    "version": (stated("awq"), {"version": "GEMV"}, "version='gemv' of awq in .* is not supported, only gemm"),
    "marlin": (stated("gptq"), {"is_marlin_format": True}, "version='marlin' of gptq"),
    "rule": (stated("gptq"), {"dynamic": {"(": {"bits": 8}}}, "is no regular expression"),
    "act-order": (stated("gptq", desc_act=True), {}, r"g_idx in .* spreads groups over all inputs \(desc_act\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not_supported_is_named_in_one_line(tmp_path: Path, name: str):
    config, changes, expected = MISTAKES[name]
    quantised, _ = directories(tmp_path, config)
    raw = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": config | changes}))
    assert re.search(expected, one_line(quantised))


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_missing_parts_are_named(tmp_path: Path, part: str):
    quantised, _ = directories(tmp_path, stated("gptq"))
    rewrite(quantised, lambda arrays: arrays.pop(f"{Q}.{part}"))
    assert f"has no tensor {Q}.{part}" in one_line(quantised)


def test_biases_of_zero_are_left_out_and_others_refused(tmp_path: Path):
    quantised, _ = directories(tmp_path, stated("gptq"))
    before = np.asarray(moe_reduce.load(quantised)(TOKENS_BT))
    rewrite(quantised, lambda arrays: arrays.update({f"{Q}.bias": np.zeros(64, np.float16)}))
    np.testing.assert_array_equal(moe_reduce.load(quantised)(TOKENS_BT), before)
    rewrite(quantised, lambda arrays: arrays.update({f"{Q}.bias": np.ones(64, np.float16)}))
    assert f"tensor {Q}.bias in" in one_line(quantised)


def test_rules_for_some_modules_are_read(tmp_path: Path):
    """GPTQModel's `dynamic`: the experts' down matrices have 8 bits; what matches "-:" is not quantised."""
    (quantised, whole), (eight, other) = (
        directories(tmp_path / str(bits), stated("gptq", bits=bits)) for bits in (4, 8)
    )
    coarse, fine = (safetensors.numpy.load_file(place / SINGLE_FILE) for place in (quantised, eight))
    values, finer = (safetensors.numpy.load_file(place / SINGLE_FILE) for place in (whole, other))
    for name in [name for name in coarse if "down_proj" in name]:
        coarse[name] = fine[name]
    safetensors.numpy.save_file(coarse, quantised / SINGLE_FILE, {"format": "pt"})
    rules = {r"-:.*\.gate$": {}, r"+:.*down_proj": {"bits": 8}}
    raw = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(raw | {"quantization_config": stated("gptq", dynamic=rules)}))
    found = quantised_params(moe_reduce.load(quantised))
    assert {path: str(value.scheme) for path, value in found.items() if "experts" in path} == {
        "layers/experts/down": "int8-affine-g32", "layers/experts/gate": "int4-affine-g32",
        "layers/experts/up": "int4-affine-g32",
    }  # fmt: skip
    down, up = (dequantised(found[f"layers/experts/{name}"], np.float32)[1, 2].T for name in ("down", "up"))
    np.testing.assert_array_equal(down, finer["model.layers.1.mlp.experts.2.down_proj.weight"])
    np.testing.assert_array_equal(up, values["model.layers.1.mlp.experts.2.up_proj.weight"])
