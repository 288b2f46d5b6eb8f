"""GGUF files that `export` writes, answered by llama.cpp: the same tokens of text, and the same greedy continuation."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_storage_gguf_families as families
from gguf_files import TOKENS

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core.config import GenerateConfig
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.generate import generate, ready

ROOT = Path(__file__).resolve().parent.parent
# Real models, and the script that makes them.
MODELS = {
    "SmolLM2": (ROOT / "runs/smollm2", "launch/smollm2.sh"),
    "a trained mixture": (ROOT / "runs/quickstart/models/mixture/model", "launch/quickstart.sh"),
}
TEXTS = ["Once upon a time", "The capital of France is", "A cell is the smallest unit of"]
MADE = 24
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _program() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs Node 20")
    if "NODE_LLAMA_CPP" not in os.environ:
        pytest.skip("needs NODE_LLAMA_CPP, a directory with `npm install node-llama-cpp@3.21.1`")


def llama_cpp(file: Path, *options: str) -> dict[str, Any]:
    """What the script prints."""
    command = ["node", str(ROOT / "launch/llama_cpp.mjs"), f"--model={file}", f"--tokens={MADE}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def continued(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    return generate(ready(moe_reduce.load(file)), prompts, GenerateConfig(max_tokens=MADE, temperature=0.0, end_ids=()))


def assert_same(file: Path, prompts: list[list[int]]) -> None:
    ours = continued(file, prompts)
    for prompt, ids in zip(prompts, ours, strict=True):
        theirs = llama_cpp(file, f"--ids={','.join(map(str, prompt))}")
        assert theirs["ids"] == ids
        assert theirs["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_continued_alike(tmp_path: Path, name: str):
    directory, script = MODELS[name]
    if not directory.is_dir():
        pytest.skip(f"needs {directory.relative_to(ROOT)}: run ./{script}")
    tokenizer = load_tokenizer(directory)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    file = families.export(directory, tmp_path / "f16", "f16")
    for text, prompt in zip(TEXTS, prompts, strict=True):
        assert llama_cpp(file, f"--prompt={text}")["prompt"] == prompt
    assert_same(file, prompts)
    for kind in ("q8_0", "q4_0"):
        file = families.export(directory, tmp_path / kind, kind)
        ours, theirs = continued(file, prompts[:1])[0], llama_cpp(file, f"--prompt={TEXTS[0]}")
        alike = next((n for n in range(MADE) if ours[n] != theirs["ids"][n]), MADE)
        print(f"{name}, {kind}: {alike} of {MADE} tokens alike; {theirs['text']!r}")
        assert len(theirs["ids"]) == MADE
        assert alike > 0  # llama.cpp rounds activations to 8 bits too, so that texts part sooner or later


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_random_model_of_each_family_is_continued_alike(tmp_path: Path, family: str):
    """The vocabulary is that of a tiny Llama, without which llama.cpp opens no file."""
    families.written(tmp_path / "model", family, vocab_size=len(TOKENS))
    families.add_tokenizer(tmp_path / "model")
    assert_same(families.export(tmp_path / "model", tmp_path / "out", "f16"), [[5, 17, 40, 3, 99]])


def test_mistakes_are_one_line(tmp_path: Path):
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    for options in (["--model=x", "--tokens=0"], ["--nonsense=1"], [], [f"--model={tmp_path / 'damaged.gguf'}"]):
        command = ["node", str(ROOT / "launch/llama_cpp.mjs"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("llama_cpp.mjs: ")
    assert main(["export", f"--model={tmp_path / 'damaged.gguf'}", "--format=gguf", f"--out={tmp_path / 'o'}"]) == 2
