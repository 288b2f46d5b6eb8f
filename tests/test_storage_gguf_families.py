"""GGUF files of families beyond Llama: names and values by the library's own tables, logits of transformers, blocks."""

import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_files import TOKENS, _neighbours, write_llama

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.models.weights import dequantised, is_quantised
from moe_reduce.storage.tensors import TensorFiles

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": None, "max_position_embeddings": 64, "num_hidden_layers": 2, "vocab_size": 61,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
# model_type -> (architecture of llama.cpp, changes of SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3moe", EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("olmoe", OLMOE | {"num_key_value_heads": 4, "eos_token_id": None, "pad_token_id": None}),
    "mixtral": ("llama", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PLAIN}),
    "qwen2_moe": ("qwen2moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
}  # fmt: skip
KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def written(directory: Path, family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family][1] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _ = parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    return model


def add_tokenizer(directory: Path) -> None:
    """Add the tokenizer of a tiny Llama, whose vocabulary the model must have."""
    write_llama(directory / "tiny.gguf")
    moe_reduce.save(moe_reduce.load(directory / "tiny.gguf"), directory / "llama")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "llama" / file).rename(directory / file)
    shutil.rmtree(directory / "llama")


def export(directory: Path, out: Path, kind: str) -> Path:
    assert main(["export", f"--model={directory}", f"--out={out}", "--format=gguf", f"--type={kind}"]) == 0
    return out / "model.gguf"


def expected(directory: Path, architecture: str) -> dict[str, np.ndarray]:
    """Tensors of a directory by the names that the library's table gives them; experts of a layer are stacked."""
    files = TensorFiles(directory)
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    table = gguf.get_tensor_name_map(number, SIZES["num_hidden_layers"])
    found: dict[str, list[np.ndarray]] = {}
    for name in sorted(
        files.entries, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")]
    ):
        values = files.read(name).astype(np.float32)
        heads = {"q_proj": 4, "k_proj": 2} if architecture == "llama" else {}
        permuted = [count for part, count in heads.items() if part in name]
        values = _neighbours(values, permuted[0]) if permuted else values
        merged = re.sub(r"experts\.\d+\.", "experts.", name)
        there = table.get_name(merged, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        found.setdefault(there, []).append(values.squeeze(0) if "shared_expert_gate" in name else values)
    return {name: np.stack(values) if len(values) > 1 else values[0] for name, values in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_has_the_librarys_names_and_values(tmp_path: Path, family: str, kind: str):
    written(tmp_path / "model", family)
    file = export(tmp_path / "model", tmp_path / "out", kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wanted = expected(tmp_path / "model", FAMILIES[family][0])
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        coded = values.ndim > 1 and "ffn_gate_inp" not in name
        assert found[name].tensor_type == (KINDS[kind] if coded else Kind.F32), name
        stored = gguf.quantize(values, KINDS[kind]) if coded else values
        np.testing.assert_array_equal(found[name].data, stored, err_msg=name)


def test_what_is_written_is_read_again(tmp_path: Path, family: str):
    written(tmp_path / "model", family)
    ours = moe_reduce.load(tmp_path / "model")
    again = moe_reduce.load(export(tmp_path / "model", tmp_path / "f16", "f16"))
    assert (again.config, again.config.family) == (ours.config, family)
    flat = trees.flatten(again.params)
    for path, leaf in trees.flatten(ours.params).items():
        wanted = np.asarray(leaf) if flat[path].dtype == np.float32 else np.asarray(leaf).astype(np.float16)
        np.testing.assert_array_equal(flat[path], wanted, err_msg=path)
    file = export(tmp_path / "model", tmp_path / "q8_0", "q8_0")
    plain, kept = moe_reduce.load(file), moe_reduce.load(file, blocks=True)
    blocks = {path: value for path, value in trees.flatten(kept.params).items() if is_quantised(value)}
    assert {path.split("/")[-1] for path in blocks} >= {"query", "output", "gate", "down", "table"}
    for path, value in blocks.items():
        assert str(value.scheme) == "int8-g32"
        np.testing.assert_array_equal(dequantised(value, np.float32), trees.flatten(plain.params)[path], err_msg=path)
    np.testing.assert_allclose(kept(TOKENS_BT), plain(TOKENS_BT), atol=1e-4 * np.abs(plain(TOKENS_BT)).max())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_logits_are_those_of_transformers(tmp_path: Path, family: str):
    # transformers reads neither the width of a head nor that of an expert, and takes its defaults
    changes = {} if family == "qwen2" else {"head_dim": 128}
    changes |= {"moe_intermediate_size": 768} if family == "qwen3_moe" else {}
    model = written(tmp_path / "model", family, **changes)
    file = export(tmp_path / "model", tmp_path / "out", "q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        wanted, exact = (one(torch.from_numpy(TOKENS_BT).long()).logits.numpy() for one in (theirs, model))
    ours = np.asarray(moe_reduce.load(file)(TOKENS_BT))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(ours - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_blocks_of_a_llama_stay_and_are_saved(tmp_path: Path, kind: Kind):
    """Queries and keys have their rows in another order in the file, scales included."""
    write_llama(tmp_path / "tiny.gguf", kind)
    plain, kept = moe_reduce.load(tmp_path / "tiny.gguf"), moe_reduce.load(tmp_path / "tiny.gguf", blocks=True)
    scheme = {Kind.Q8_0: "int8-g32", Kind.Q4_0: "int4-g32"}[kind]
    moe_reduce.save(kept, tmp_path / "copy")
    again = moe_reduce.load(tmp_path / "copy")
    for model in (kept, again):
        for path, value in trees.flatten(model.params).items():
            assert is_quantised(value) == (value.ndim > 2 or path.endswith("table")), path
            assert not is_quantised(value) or str(value.scheme) == scheme
            wanted = trees.flatten(plain.params)[path]
            np.testing.assert_array_equal(dequantised(value, np.float32), wanted, err_msg=path)


def test_a_mixture_is_scored_and_pruned(tmp_path: Path):
    written(tmp_path / "model", "qwen3_moe", vocab_size=len(TOKENS))
    add_tokenizer(tmp_path / "model")
    file = export(tmp_path / "model", tmp_path / "out", "f16")
    np.save(tmp_path / "tokens.npy", TOKENS_BT)
    data, scores = f"--data={tmp_path / 'tokens.npy'}", tmp_path / "scores.json"
    assert main(["score", f"--model={file}", data, f"--out={scores}", "--layer-wise"]) == 0
    options = [f"--scores={scores}", "--criterion=reap", "--keep=0.5"]
    assert main(["prune", f"--model={file}", *options, f"--out={tmp_path / 'small'}"]) == 0
    small, whole = moe_reduce.load(tmp_path / "small"), moe_reduce.load(file)
    kept = small.chain[-1].kept_experts
    assert kept is not None
    for layer, row in enumerate(kept):
        before = np.asarray(trees.flatten(whole.params)["layers/experts/down"])[layer][[index for _, index in row]]
        np.testing.assert_array_equal(trees.flatten(small.params)["layers/experts/down"][layer], before)


MISTAKES = {
    "scaling": ("qwen3", {"rope_parameters": LINEAR}, "rotary_scaling="),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "sliding_window=5"),
    "renormalised": ("olmoe", {"norm_topk_prob": True}, "moe="),
    "raw": ("qwen3_moe", {"norm_topk_prob": False}, "moe="),
    "grouped heads": ("olmoe", {"num_key_value_heads": 2}, "key_value_heads=2"),
    "clipped": ("olmoe", {"clip_qkv": 2.0}, "clip_qkv=2.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_file_cannot_state_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    family, changes, part = MISTAKES[name]
    written(tmp_path / "model", family, **changes)
    capsys.readouterr()
    assert main(["export", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--format=gguf"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line
    assert f"GGUF files of {FAMILIES[family][0]} cannot state" in line
    assert not (tmp_path / "out").exists()


def test_the_nearest_architecture_is_named(tmp_path: Path):
    write_llama(tmp_path / "tiny.gguf", changes={"general.architecture": "qwen3vlmoe"})
    with pytest.raises(UserError, match=r"'qwen3vlmoe' is not supported as GGUF; known: llama, .*nearest is qwen3moe"):
        moe_reduce.load(tmp_path / "tiny.gguf")
