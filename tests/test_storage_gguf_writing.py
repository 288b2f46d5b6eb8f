"""GGUF files that `export` writes: reopened by the library's reader and by our own, weights, logits and tokenizer."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_llama

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.data.gguf_vocabulary import gguf_vocabulary
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.data.tokenizers import load_tokenizer

TEXTS = ["the 12 ants\n", "<|im_start|>the", "naïve 2048  x"]
KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama converted from GGUF to a model directory, with a byte-level tokenizer."""
    write_llama(tmp_path / "tiny.gguf", tie_word_embeddings=request.param)
    moe_reduce.save(moe_reduce.load(tmp_path / "tiny.gguf"), tmp_path / "model")
    return tmp_path / "model"


def export(directory: Path, out: Path, kind: str) -> int:
    return main(["export", f"--model={directory}", f"--out={out}", "--format=gguf", f"--type={kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(directory, tmp_path, kind):
    assert export(directory, tmp_path / "out", kind) == 0
    file = tmp_path / "out/model.gguf"
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    original = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        expected = tensor.data if tensor.data.ndim == 1 else gguf.quantize(tensor.data, KINDS[kind])
        np.testing.assert_array_equal(found[name].data, expected, err_msg=name)
        assert found[name].tensor_type == (Kind.F32 if tensor.data.ndim == 1 else KINDS[kind])
    ours, again = moe_reduce.load(directory), moe_reduce.load(file)
    assert again.config == ours.config
    tolerance = {"f16": 1e-3, "q8_0": 1e-2, "q4_0": 0.2}[kind]
    for path, leaf in trees.flatten(again.params).items():
        expected = np.asarray(trees.flatten(ours.params)[path])
        assert np.abs(np.asarray(leaf, np.float32) - expected).max() <= tolerance * np.abs(expected).max(), path
    content = json.loads((tmp_path / "out/export.json").read_text())
    assert content["files"]["model.gguf"]["type"] == kind
    assert content["files"]["model.gguf"]["bytes"] == file.stat().st_size


def test_the_tokenizer_is_written(directory, tmp_path):
    assert export(directory, tmp_path / "out", "q8_0") == 0
    ours, again = load_tokenizer(directory), load_tokenizer(tmp_path / "out/model.gguf")
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert again.end_ids == ours.end_ids
    before, after = (gguf.GGUFReader(path).fields for path in (tmp_path / "tiny.gguf", tmp_path / "out/model.gguf"))
    for key in ("model", "pre", "tokens", "merges", "token_type", "bos_token_id", "eos_token_id"):
        name = f"tokenizer.ggml.{key}"
        assert after[name].contents() == before[name].contents(), key
    assert after["tokenizer.chat_template"].contents() == before["tokenizer.chat_template"].contents()


def test_a_sentencepiece_tokenizer_is_written(tmp_path):
    tokenizer = train_tokenizer(["the ants and the 12 naïve ants went home. " * 20], 280)
    tokenizer.save(tmp_path)
    described = gguf_vocabulary(tmp_path, 290)  # ten rows of the table have no token
    assert described["tokenizer.ggml.tokens"][-1] == "[PAD9]"
    write_llama(tmp_path / "x.gguf", changes={"tokenizer.ggml.merges": None} | described, vocab_size=290)
    again = load_tokenizer(tmp_path / "x.gguf")
    texts = ["the ants", "naïve ants went 12 home"]
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    with pytest.raises(UserError, match="has 280 tokens, the model 200"):
        gguf_vocabulary(tmp_path, 200)


def test_mistakes_are_one_line(directory, tmp_path, capsys):
    write_llama(tmp_path / "odd.gguf", intermediate_size=80)
    assert export(tmp_path / "odd.gguf", tmp_path / "out", "q4_0") == 2
    assert "blocks of 32, which do not divide the 80 inputs of layers/mlp/down: choose f16" in capsys.readouterr().err
    assert main(["quantize", f"--model={directory}", f"--out={tmp_path / 'q'}", "--scheme=int8"]) == 0
    assert export(tmp_path / "q", tmp_path / "out", "q8_0") == 2
    assert "is of the family moe_reduce" in capsys.readouterr().err
    splitter = json.loads((directory / "tokenizer.json").read_text())
    splitter["pre_tokenizer"]["pretokenizers"][0] = {"type": "Whitespace"}
    (directory / "tokenizer.json").write_text(json.dumps(splitter))
    assert export(directory, tmp_path / "out", "q8_0") == 2
    assert "splits text by a rule that is not known here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
