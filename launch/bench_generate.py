"""Median speed of decoding one text on this machine, compared with transformers' generate on torch.

Both sides read the same random LLaMA and use the same prompt, precision and threads. Each has its own process, and runs
alternate (ours, theirs, copy, read, ours, …), so that drift of the machine's speed affects all alike. Weight bytes read
per second are compared with two bandwidths: copying a large array (read and written) and summing it (read only).

Command: ./launch/bench_generate.sh    (writes docs/results/generate/summary.json; --tiny for a quick check)
"""

import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import side_by_side
from side_by_side import Run, options, publish

PROMPT_TOKENS = 16
SIZES = {
    "vocab_size": 32_000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "intermediate_size": 3072, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SIZES | {"vocab_size": 512, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 192}
NAMES = {"float32": "fp32", "bfloat16": "bf16"}


def write_model(directory: Path, sizes: dict[str, Any], dtype: str) -> int:
    """Writes a random model; returns the bytes of its weights, all of which are read for each token."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def prompt_of(sizes: dict[str, Any]) -> list[int]:
    """Prompt ids, the same for both sides."""
    return [(7 * number) % sizes["vocab_size"] for number in range(1, PROMPT_TOKENS + 1)]


def ours(directory: Path, dtype: str, tokens: int) -> tuple[Run, list[int]]:
    """Greedy decoding as `moe-reduce generate` does it."""
    import moe_reduce
    from moe_reduce.core.config import ExecutionConfig, GenerateConfig
    from moe_reduce.inference.generate import generate, ready

    model = ready(moe_reduce.load(directory, dtype, ExecutionConfig(compute_dtype=dtype).resolve("cpu")))
    prompt = prompt_of(json.loads((directory / "config.json").read_text()))

    def run() -> list[int]:
        return generate(model, [prompt], GenerateConfig(max_tokens=tokens))[0]

    return run, run()


def theirs(directory: Path, dtype: str, tokens: int) -> tuple[Run, list[int]]:
    """Greedy decoding with transformers' generate on torch."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([prompt_of(model.config.to_dict())])
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def run() -> list[int]:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, PROMPT_TOKENS:].tolist()

    return run, run()


def copy(megabytes: int) -> tuple[Run, None]:
    """Copies one array to another, with all threads."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source, target = torch.ones(megabytes * 10**6 // 4), torch.zeros(megabytes * 10**6 // 4)
    return lambda: target.copy_(source)[:1].int().tolist(), None


def read(megabytes: int) -> tuple[Run, None]:
    """Sums one array, with all threads."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = torch.ones(megabytes * 10**6 // 4)
    return lambda: [int(source.sum())], None


def compare(sizes: dict[str, Any], dtype: str, tokens: int, megabytes: int, repeats: int) -> dict[str, Any]:
    """Compares our decoding with transformers' and with the bandwidth."""
    with tempfile.TemporaryDirectory() as place:
        weight_bytes = write_model(Path(place), sizes, dtype)
        builds = {side.__name__: (side, Path(place), dtype, tokens) for side in (ours, theirs)}
        seconds, said = side_by_side.compare(builds | {"copy": (copy, megabytes), "read": (read, megabytes)}, repeats)
    # in bf16 the two round differently, so that greedy decoding diverges
    if dtype == "float32" and said["ours"] != said["theirs"]:
        raise AssertionError("in fp32 both must write the same text")
    bandwidth, reading = 2 * megabytes * 10**6 / seconds["copy"], megabytes * 10**6 / seconds["read"]
    reached = weight_bytes * tokens / seconds["ours"]
    return {
        "name": f"LLaMA {weight_bytes / {'float32': 4, 'bfloat16': 2}[dtype] / 1e6:.1f}M, {NAMES[dtype]}",
        "shape": f"1 × {PROMPT_TOKENS} + {tokens} tokens, greedy",
        "same_text": said["ours"] == said["theirs"],
        "our_tokens_per_second": tokens / seconds["ours"],
        "peer_tokens_per_second": tokens / seconds["theirs"],
        "ratio": seconds["theirs"] / seconds["ours"],
        "weight_bytes": weight_bytes,
        "bandwidth": bandwidth,
        "share_of_bandwidth": reached / bandwidth,
        "read_bandwidth": reading,
        "share_of_read_bandwidth": reached / reading,
    }


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the results table."""
    cells = []
    for row in rows:
        rates = [f"{row[f'{side}_tokens_per_second']:.1f} tokens/s" for side in ("our", "peer")]
        cells.append([f"{row['name']}, beside transformers", row["shape"], *rates, f"{row['ratio']:.2f}×", "≥ 2×"])
        reached = row["share_of_bandwidth"] * row["bandwidth"]
        for what, prefix, aim in (("a copy", "", "≥ 60 %"), ("reading alone", "read_", "")):
            rates = [f"{rate / 1e9:.1f} GB/s" for rate in (reached, row[f"{prefix}bandwidth"])]
            share = f"{row[f'share_of_{prefix}bandwidth']:.0%}"
            cells.append([f"{row['name']}, weights read, beside {what}", row["shape"], *rates, share, aim])
    return cells


def main() -> None:
    """Measures and writes the summary."""
    given = options(__doc__, "generate", repeats=5)
    sizes, tokens, megabytes = (TINY, 8, 8) if given.tiny else (SIZES, 64, 512)
    rows = []
    for dtype in NAMES:
        print(dtype, flush=True)
        rows.append(compare(sizes, dtype, tokens, megabytes, given.repeats))
    versions = {name: metadata.version(name) for name in ("jax", "torch", "transformers")}
    summary = {
        "title": f"Decoding on CPU beside transformers {versions['transformers']} on torch {versions['torch']}",
        "command": "./launch/bench_generate.sh",
        "columns": ["what", "shape", "ours", "peer", "ratio", "aim"],
        "rows": table(rows),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions,
        "decoding": rows,
    }
    publish(given.out, summary)


if __name__ == "__main__":
    main()
