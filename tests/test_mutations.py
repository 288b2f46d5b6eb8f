"""Damaged files of every format: one line, the same result, or a difference that nobody could see.

A short seeded run here; the long one, of more than a thousand mutations, is slow.
"""

import collections
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from mutations import BYTES, STRUCTURES, mutate

HARNESS = Path(__file__).with_name("mutation_harness.py")
# Subjects of which a mutation may be read as something else, and why that is right.
MAY_DIFFER = {
    "safetensors": "weights have no checksum; inspect --verify compares the hash of the file in manifest.json",
    "sharded safetensors": "as safetensors",
    "index": "keys beside weight_map say nothing that is read",
    "config.json": "another value of a setting is another model of the same shapes",
    "manifest.json": "the history is text that is shown; another path or number in it is another history",
    "adapter of PEFT": "PEFT writes no hash, and another alpha or weight is another adapter",
    "tokenizer.model": "another score or piece is another tokenizer; its hash is part of every token cache",
    "tokenizer.json": "another merge or token is another tokenizer; its hash is part of every token cache",
    "tokenizer_config.json": "another setting is another tokenizer; its hash is part of every token cache",
    "txt": "other bytes are another text",
    "jsonl": "as txt; a line may be missing at the end of a line",
    "jsonl.gz": "other text, compressed again, is another text",
    "jsonl.zst": "as jsonl.gz; frames are written without a checksum by default",
    "txt.gz": "as jsonl.gz",
    "parquet": "pages have no checksum by default",
    "npy": "other ids below the vocabulary are other ids",
    "tokens": "ids have no checksum; their number, their type and the tokenizer are checked",
    "result": "other numbers in a summary are another result; a last line of a log that was cut short is dropped",
    "compared run": "other numbers in a summary are another result",
    "resumed run": "as result",
    "config of a run": "keys that an earlier version did not write have their defaults; true equals 1",
    "scores": "other finite numbers are other scores",
    "checkpoints": "checkpoints have checksums of their trees, not of every array",
}


def run(*arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(HARNESS), *arguments],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(results: list[dict]) -> collections.Counter:
    """Fail for every verdict but the three good ones; return their counts."""
    bad = [one for one in results if one["verdict"] not in ("refused", "same", "different")]
    assert not bad, "\n\n".join(
        f"{one['subject']} {one['way']} {one['seed']}: {one['verdict']} {one['detail']}" for one in bad
    )
    silent = [one for one in results if one["verdict"] == "different" and one["subject"] not in MAY_DIFFER]
    assert not silent, silent
    return collections.Counter(one["verdict"] for one in results)


def test_a_mutation_of_every_format():
    counts = check(run("--each=1", "--seed=1"))
    assert counts["refused"] > counts.total() // 3


@pytest.mark.slow
def test_a_thousand_mutations():
    counts = check(run("--each=45"))
    print(dict(counts))
    assert counts.total() > 1000
    assert counts["refused"] > counts.total() // 3


@pytest.mark.parametrize("suffix", STRUCTURES)
def test_mutations_are_the_same_for_a_seed_and_change_the_file(tmp_path, suffix):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    contents = {
        ".safetensors": len(header).to_bytes(8, "little") + header + bytes(4),
        ".npy": b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + b" " * 117 + b"\n" + bytes(128),
    }
    if suffix == ".gguf":
        writer = gguf.GGUFWriter(tmp_path / "written", "llama")
        writer.add_uint32("llama.block_count", 2)
        writer.add_tensor("one", np.ones((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        contents[suffix] = (tmp_path / "written").read_bytes()
    content = contents.get(suffix, header + b"\n")
    ways, changed = set(), 0
    for seed in range(60):
        found = []
        for _ in range(2):
            file = tmp_path / f"a{suffix}"
            file.write_bytes(content)
            ways.add(mutate(file, random.Random(seed)))
            found.append(file.read_bytes())
        assert found[0] == found[1]
        changed += found[0] != content
    assert ways == {"structure", *BYTES}
    assert changed > 50
