"""Damaged files of every format: one line, the same result, or a difference that nobody could see.

A short seeded run here; the long one, of more than a thousand mutations, is slow.
"""

import collections
import json
import os
import random
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import gguf
import numpy as np
import pytest
from mutations import BYTES, STRUCTURES, mutate

HARNESS = Path(__file__).with_name("mutation_harness.py")
# Subject -> place that a mutation changed (a pattern, as mutation_places.py names them) -> why another result is right.
CHECKSUM = "weights have no checksum in this format; inspect --verify compares the file's hash in manifest.json"
HISTORY = "what a step was called, read and measured is text that inspect shows; no result depends on it"
FIGURES = "a summary has no checksum: another number of the right kind is another result"
TEXT = "other bytes that are UTF-8 are another text; its hash names every token cache made of it"
ROWS = {
    "line.text": TEXT,
    "line.n": "no other field than the text is read",
    "number of lines": "a file may end after any line",
}
VOCABULARY = "another token is another tokenizer; its hash is part of every token cache"
DEFAULTS = "a key that an earlier version did not write has its default"
MAY_DIFFER = {
    "safetensors": {"data": CHECKSUM},
    "sharded safetensors": {"data": CHECKSUM},
    "int8": {"data": CHECKSUM},
    "config.json": {
        "initializer_range": "how a new model of this shape would start; the weights are read",
        "rope_theta": "another rotary base is another model of the same shapes",
        "rms_norm_eps": "another epsilon is another model of the same shapes",
        "max_position_embeddings": "a longer or shorter context needs no other tensor",
    },
    "manifest.json": {
        "chain.*": HISTORY,
        "parameters*": "counts are for readers of the file; inspect counts the parameters of config.json",
        "commit": HISTORY,
        "versions*": HISTORY,
    },
    "compressed-tensors": {"data": CHECKSUM, "initializer_range": "as in config.json"},
    "gguf": {"values of *": "weights have no checksum in this format"},
    "gguf Q8_0": {"values of *": "weights have no checksum in this format"},
    "tokenizer of gguf": {"tokenizer.*": VOCABULARY},
    "adapter of PEFT": {
        "data": "PEFT writes no hash: another weight is another adapter",
        "lora_alpha": "another scale of the right kind is another adapter",
    },
    "tokenizer.model": {"bytes": "another score or piece is another tokenizer; its hash is part of every token cache"},
    "tokenizer.json": {"model.*": VOCABULARY, "added_tokens.*": VOCABULARY},
    "tokenizer_config.json": {"*": "another setting is another tokenizer; its hash is part of every token cache"},
    "txt": {"bytes": TEXT},
    "txt.gz": {"bytes": f"{TEXT} (compressed again)"},
    "jsonl": ROWS,
    "jsonl.gz": ROWS,
    "jsonl.zst": ROWS | {"compressed bytes": "frames are written without a checksum by default"},
    "parquet": {"bytes": "pages have no checksum by default"},
    "npy": {"data": "other ids below the vocabulary are other ids"},
    "tokens": {"bytes": "ids have no checksum; their number, their type and the tokenizer are checked"},
    "result": {
        **dict.fromkeys(("parameters", "bytes", "validation.*", "tokens", "steps", "expert_use.*"), FIGURES),
        **dict.fromkeys(("name", "seed", "tokens_per_second", "train_flops_per_token"), FIGURES),
        "line.*": "a point of a curve has no checksum; a line of another split belongs to another curve",
        "number of lines": "a last line that a kill cut short is dropped",
    },
    "compared run": dict.fromkeys(("bytes", "parameters", "validation.*", "expert_use.*", "name"), FIGURES),
    "resumed run": {
        "*": "a finished run does nothing: its summary is shown as it is",
        "line.*": "lines up to the resumed step are kept as they are",
    },
    "config of a run": {"* (gone)": DEFAULTS},
    "scores": {
        "counts.*": "another count of at least 0 is another score",
        "scores.*": "another finite number is another score",
        "tokens": "another count of at least 0 is another score",
        "model (gone)": "earlier versions did not name the scored model",
    },
    "checkpoints": {"*": "checkpoints have checksums of their trees, not of every array"},
}  # fmt: skip


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
    silent = [
        (one["subject"], place)
        for one in results
        if one["verdict"] == "different"
        for place in one["places"] or ["nothing"]
        if not any(fnmatch(place, pattern) for pattern in MAY_DIFFER.get(one["subject"], {}))
    ]
    assert not silent, silent
    return collections.Counter(one["verdict"] for one in results)


SOME = ("safetensors", "config.json", "int8", "gguf", "hypernetwork", "adapter of PEFT", "tokenizer.json", "txt.gz",
        "parquet", "resumed run", "scores", "checkpoints")  # fmt: skip


def test_a_mutation_of_some_formats():
    counts = check(run("--each=1", "--seed=1", f"--only={','.join(SOME)}"))
    assert counts.total() == len(SOME)
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
