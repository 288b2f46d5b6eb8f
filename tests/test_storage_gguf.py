"""GGUF files: equal to the library's values and transformers' reading, saved as directories, refused when damaged."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_files import BYTE_LEVEL, TEMPLATE, TOKENS, stored, write_llama

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.families import parameter_layouts, read_config
from moe_reduce.storage import gguf as storage_gguf
from moe_reduce.storage.parameter_tensors import open_tensors

TOKENS_BT = np.random.default_rng(0).integers(0, len(TOKENS), (2, 12), dtype=np.int32)
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]
TEXT = "The then 1212 an  <|im_start|>héllo\n\n漢字 12"


def theirs(path: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **arguments).eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS_BT).long()).logits.numpy()


def assert_close(ours: Any, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(ours), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_the_librarys_and_logits_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, tied: bool
):
    monkeypatch.setattr(storage_gguf, "ROWS", 50)  # several parts, the last one smaller
    weights = write_llama(tmp_path / "tiny.gguf", kind, tie_word_embeddings=tied)
    config, raw = read_config(tmp_path / "tiny.gguf")
    assert (config.key_value_heads, config.head_width, config.tied_embeddings) == (2, 16, tied)
    assert (config.rope_theta, config.norm_epsilon, raw["eos_token_id"]) == (50_000.0, 1e-5, 2)
    files = open_tensors(tmp_path / "tiny.gguf", config)
    assert set(files.entries) == set(weights)
    for name, weight in weights.items():
        values = files.read(name)
        assert (values.dtype, values.shape) == (files.entries[name].dtype, files.entries[name].shape)
        np.testing.assert_array_equal(values.astype(np.float32), stored(weight, kind), err_msg=name)
    model = moe_reduce.load(tmp_path / "tiny.gguf", dtype="float32")
    assert_close(model(TOKENS_BT), their_logits(theirs(tmp_path, gguf_file="tiny.gguf")))


def test_short_types_stay_as_they_are_unless_a_file_mixes_them(tmp_path: Path):
    write_llama(tmp_path / "tiny.gguf", Kind.BF16)
    flat = trees.flatten(moe_reduce.load(tmp_path / "tiny.gguf").params)
    matrices = {
        str(flat[leaf.path].dtype)
        for leaf in parameter_layouts(read_config(tmp_path / "tiny.gguf")[0])
        if leaf.record.is_matrix
    }
    assert matrices == {"bfloat16"}


def test_a_saved_copy_is_a_directory_that_transformers_opens(tmp_path: Path):
    write_llama(tmp_path / "tiny.gguf", Kind.Q4_1)
    model = moe_reduce.load(tmp_path / "tiny.gguf")
    moe_reduce.save(model, tmp_path / "copy")
    assert_close(model(TOKENS_BT), their_logits(theirs(tmp_path / "copy")))
    again = moe_reduce.load(tmp_path / "copy")
    assert again.config == model.config
    np.testing.assert_array_equal(again(TOKENS_BT), model(TOKENS_BT))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (1, 2, TEMPLATE)
    first, second = load_tokenizer(tmp_path / "tiny.gguf"), load_tokenizer(tmp_path / "copy")
    assert tokenizer(TEXT)["input_ids"] == first.encode_prompt(TEXT) == second.encode_prompt(TEXT)
    assert first.hash == second.hash
    (step,) = again.chain
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    assert (step.command, step.inputs[0].sha256) == ("convert", digest)
    assert main(["inspect", f"--model={tmp_path / 'copy'}", "--verify"]) == 0


def test_every_command_reads_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_llama(tmp_path / "tiny.gguf", Kind.Q8_0)
    (tmp_path / "text.txt").write_text("then an the 12 than.\n" * 200)
    model, data = f"--model={tmp_path / 'tiny.gguf'}", f"--data={tmp_path / 'text.txt'}"
    assert main(["inspect", model, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["model_type"], described["dtypes"]) == ("llama", ["float32"])
    assert main(["plan", model, "--context=32"]) == 0
    assert main(["generate", model, "--prompt=then", "--max-tokens=4", "--temperature=0"]) == 0
    assert main(["generate", model, "--chat", "--prompt=then", "--max-tokens=4", "--temperature=0"]) == 0
    sizes = ["--sequence-length=16", "--batch-size=4", "--max-batches=2", f"--cache={tmp_path / 'cache'}"]
    assert main(["evaluate", model, data, *sizes, f"--out={tmp_path / 'quality'}"]) == 0
    assert main(["group-heads", model, "--key-value-heads=1", f"--out={tmp_path / 'grouped'}"]) == 0
    (step,) = moe_reduce.load(tmp_path / "grouped").chain
    assert step.inputs[0].sha256 == hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    assert load_tokenizer(tmp_path / "grouped").hash == load_tokenizer(tmp_path / "tiny.gguf").hash
    assert main(["score", model, data, *sizes, f"--out={tmp_path / 'scores.json'}"]) == 2
    assert "dense" in capsys.readouterr().err


def test_a_file_is_the_base_of_an_adapter(tmp_path: Path):
    write_llama(tmp_path / "tiny.gguf", Kind.Q8_0)
    (tmp_path / "text.txt").write_text("then an the 12 than.\n" * 400)
    small = ["train.steps=2", "train.warmup_steps=1", "train.batch_size=8", "data.sequence_length=16", "budget=0.1"]
    given = [
        f"model={tmp_path / 'tiny.gguf'}",
        f"data.source={tmp_path / 'text.txt'}",
        f"data.cache={tmp_path / 'cache'}",
    ]
    overrides = [f"--config.{one}" for one in (*small, *given)]
    assert main(["adapt", "--config=adapt", f"--workdir={tmp_path / 'run'}", *overrides]) == 0
    merged = next((tmp_path / "run").rglob("model/manifest.json")).parent
    assert load_tokenizer(merged).hash == load_tokenizer(tmp_path / "tiny.gguf").hash


@pytest.mark.parametrize(("rule", "digits"), [("smollm", ["1", "2"]), ("gpt-2", ["12"]), ("qwen2", ["1", "2"])])
def test_text_is_split_as_the_file_says(tmp_path: Path, rule: str, digits: list[str]):
    write_llama(tmp_path / "tiny.gguf", changes={"tokenizer.ggml.pre": rule})
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    ids = tokenizer.encode("12 the<|im_end|>")
    assert [TOKENS[token] for token in ids] == [*digits, "Ġthe", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert set(tokenizer.end_ids) == {0, 2}
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")


def test_a_sentencepiece_vocabulary_is_read_as_transformers_reads_it(tmp_path: Path):
    pieces = ["▁t", "he", "▁the", "▁", *"thean 12"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(pieces)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    changes = dict.fromkeys(BYTE_LEVEL) | {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    write_llama(tmp_path / "tiny.gguf", changes=changes, vocab_size=len(tokens))
    ours = load_tokenizer(tmp_path / "tiny.gguf")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in ("the then 12é", " the", "a\nb"):
        assert ours.encode_prompt(text) == reader(text)["input_ids"]
        assert ours.encode_prompt(text)[0] == 1
    assert tokens[ours.encode("the")[0]] == "▁the"
    write_llama(
        tmp_path / "no.gguf", changes=changes | {"tokenizer.ggml.add_space_prefix": False}, vocab_size=len(tokens)
    )
    unprefixed = load_tokenizer(tmp_path / "no.gguf")
    assert tokens[unprefixed.encode("the")[0]] == "t"
    assert unprefixed.decode(unprefixed.encode(" the")) == " the"


WRONG_KEYS = {
    "architecture": ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported"),
    "missing": ({"llama.block_count": None}, "llama.block_count is missing"),
    "type": ({"llama.block_count": "2"}, "llama.block_count must be int, got '2'"),
    "layers": ({"llama.block_count": 3}, "has no tensor blk.2.attn_k.weight"),
    "width": ({"llama.feed_forward_length": 95}, "has shape"),
    "scaling": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported, only 'none'"),
    "unknown": ({"llama.logit_scale": 2.0}, "llama.logit_scale=2.0 is not known"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
    "no experts": ({"llama.expert_used_count": 2}, "llama.expert_used_count=2 is not supported, only 0"),
    "partial": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8 is not supported, only 16"),
    "parts": ({"split.count": 3}, "is one of 3 parts"),
}  # fmt: skip


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        moe_reduce.load(path)
    return one_line(error, path)


def one_line(error: pytest.ExceptionInfo[UserError], path: Path) -> str:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_metadata_that_cannot_be_represented_is_refused_by_name(tmp_path: Path, name: str):
    changes, expected = WRONG_KEYS[name]
    write_llama(tmp_path / "tiny.gguf", changes=changes)
    assert expected in refused(tmp_path / "tiny.gguf")


WRONG_TOKENIZERS = {
    "kind": ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model='rwkv' is not supported"),
    "none": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model=None is not supported"),
    "rule": ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre='viking' is not known"),
    "tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    "merges": ({"tokenizer.ggml.merges": ["not there"]}, "cannot be read"),
    "special": ({"tokenizer.ggml.bos_token_id": 9999}, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TOKENIZERS)
def test_a_tokenizer_of_an_unknown_kind_is_refused(tmp_path: Path, name: str):
    changes, expected = WRONG_TOKENIZERS[name]
    write_llama(tmp_path / "tiny.gguf", changes=changes)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / "tiny.gguf")
    assert expected in one_line(error, tmp_path / "tiny.gguf")


def test_a_damaged_file_is_refused_wherever_it_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_llama(tmp_path / "tiny.gguf", Kind.Q8_0)
    content, damaged = (tmp_path / "tiny.gguf").read_bytes(), tmp_path / "damaged.gguf"
    for size in (0, 3, 4, 10, 23, 200, 5000, 9000, len(content) // 2, len(content) - 40):
        damaged.write_bytes(content[:size])
        assert "is not a whole GGUF file" in refused(damaged), size
    for start, value in ((0, b"GGML"), (4, struct.pack("<I", 77)), (8, struct.pack("<Q", 1 << 40)), (40, b"\xff" * 9)):
        damaged.write_bytes(content[:start] + value + content[start + len(value) :])
        assert "is not a whole GGUF file" in refused(damaged), start
    assert "is not a whole GGUF file" in refused(damaged)
    assert main(["inspect", f"--model={damaged}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert "No such file" in refused(tmp_path / "absent.gguf")


def test_a_tensor_of_another_architecture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gguf_files.NAMES, "lm_head", "rope_freqs")
    write_llama(tmp_path / "tiny.gguf", tie_word_embeddings=False)
    assert "tensor rope_freqs.weight" in refused(tmp_path / "tiny.gguf")


def test_inserted_bytes_are_refused_wherever_they_are(tmp_path: Path):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    content = file.read_bytes()
    for place in (len(content) // 2, len(content) - 4, len(content)):
        file.write_bytes(content[:place] + bytes(64) + content[place:])
        assert "bytes follow its last tensor" in refused(file), place


@pytest.mark.parametrize(("count", "part"), [(1 << 60, "has no end"), (1 << 20, "ends within")])
def test_a_list_without_end_is_refused_at_once(tmp_path: Path, count: int, part: str):
    file, key = tmp_path / "tiny.gguf", b"tokenizer.ggml.token_type"
    write_llama(file)
    content = file.read_bytes()
    place = content.index(key) + len(key) + 8  # behind the types of the value and of its elements
    file.write_bytes(content[:place] + count.to_bytes(8, "little") + content[place + 8 :])
    assert part in refused(file)
