"""A model larger than memory: time and peak resident memory of prune, layer-wise score, inspect and plan.

Pruning alternates with copying as many bytes as it keeps; each starts when earlier writes are on disk. inspect and
plan read headers only; their times exclude imports.

Command: python launch/bench_files.py [--model DIR] (default: a synthetic 7.7 GB Qwen3-MoE, written first and removed);
writes docs/results/files/summary.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_reduce.families import read_config
from moe_reduce.storage.tensors import TensorFiles

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "moe_reduce"]
CHUNK = 4 * 1024**2
TOKENS, LENGTH = 4096, 256  # size of the scored text


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def copy(model: Path, out: Path, count: int) -> float:
    """Seconds to copy the first `count` bytes of the weights, file to file."""
    started = time.perf_counter()
    left = count
    out.mkdir()
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as source, open(out / file.name, "wb", buffering=0) as target:
            while left > 0 and (data := source.read(min(CHUNK, left))):
                target.write(data)
                left -= len(data)
    return time.perf_counter() - started


def write_scores(model: Path, file: Path) -> None:
    """Writes random scores of the model's shape: which experts are kept does not change the cost."""
    config, _ = read_config(model)
    assert config.moe is not None
    shape = (config.layers, config.moe.experts)
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    content = {"tokens": 1, "counts": np.ones(shape).tolist(), "scores": {"reap": values.tolist()}}
    file.write_text(json.dumps(content))


def weights_bytes(directory: Path) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def main() -> None:
    """Measures and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a Qwen3-MoE directory (default: a synthetic one, removed afterwards)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/files/summary.json", help="result")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = arguments.model or scratch / "model"
        if arguments.model is None:
            subprocess.run([sys.executable, str(ROOT / "launch/synthetic_moe.py"), str(model)], check=True)
        summary = compare(model, scratch, arguments.repeats)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print(arguments.out)


def compare(model: Path, scratch: Path, repeats: int) -> dict:
    """All measurements of one model directory."""
    pruning, layer_wise = prune(model, scratch, repeats), score(model, scratch)
    headers = {command: beyond_imports(command, model, repeats) for command in ("inspect", "plan")}
    size = f"{weights_bytes(model) / 1e9:.1f} GB"
    rows = [
        ["prune half of the experts, beside copying the kept bytes", f"{pruning['ratio']:.2f}×", "≤ 2.5×"],
        ["peak memory of prune", f"{pruning['peak_bytes'] / 1e9:.2f} GB", "< 1 GB"],
        [f"layer-wise score of {TOKENS:,} tokens", f"{layer_wise['seconds']:.0f} s", ""],
        ["peak memory of layer-wise score", f"{layer_wise['peak_bytes'] / 1e9:.2f} GB", "< 2.5 GB"],
        *([f"{name}, beyond the imports", f"{seconds:.2f} s", "< 2 s"] for name, seconds in headers.items()),
    ]
    return {
        "title": f"A Qwen3-MoE checkpoint of {size}, passing through a small machine",
        "command": "python launch/bench_files.py",
        "columns": ["what", "measured", "aim"],
        "rows": rows,
        "prune": pruning,
        "score": layer_wise,
        "headers_seconds": headers,
    }


def prune(model: Path, scratch: Path, repeats: int) -> dict:
    """Medians of pruning half of the experts and of copying as many bytes, in turn."""
    write_scores(model, scratch / "scores.json")
    pruned = scratch / "pruned"
    command = [*COMMAND, "prune", f"--model={model}", f"--scores={scratch / 'scores.json'}"]
    prunes, copies, peak, kept = [], [], 0, 0
    for _ in range(repeats):
        os.sync()
        seconds, memory = measured([*command, "--keep=0.5", f"--out={pruned}"])
        prunes.append(seconds)
        peak, kept = max(peak, memory), weights_bytes(pruned)
        check_pruned(model, pruned)
        shutil.rmtree(pruned)
        os.sync()
        copies.append(copy(model, scratch / "copied", kept))
        shutil.rmtree(scratch / "copied")
    ratio = float(np.median(prunes) / np.median(copies))
    return {"ratio": ratio, "peak_bytes": peak, "kept_bytes": kept, "seconds": prunes, "copy_seconds": copies}


def check_pruned(model: Path, pruned: Path) -> None:
    """Raises unless half of the experts remain and the last of them has the bytes of its original."""
    before, after = (TensorFiles(directory) for directory in (model, pruned))
    (before_moe, after_moe) = (read_config(directory)[0].moe for directory in (model, pruned))
    assert before_moe is not None
    assert after_moe is not None
    assert 2 * after_moe.experts == before_moe.experts
    step = json.loads((pruned / "manifest.json").read_text())["chain"][-1]
    layer, expert = step["kept_experts"][-1][-1]
    name = f"model.layers.{layer}.mlp.experts.{{}}.up_proj.weight"
    kept = after.read_whole(name.format(after_moe.experts - 1))
    assert kept.tobytes() == before.read_whole(name.format(expert)).tobytes()


def score(model: Path, scratch: Path) -> dict:
    """Measures REAP on random tokens, a layer at a time."""
    config, _ = read_config(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (TOKENS // LENGTH, LENGTH + 1)).astype(np.int32)
    np.save(scratch / "tokens.npy", tokens)
    data = [f"--data={scratch / 'tokens.npy'}", f"--sequence-length={LENGTH + 1}", "--batch-size=4"]
    out = f"--out={scratch / 'found.json'}"
    seconds, peak = measured([*COMMAND, "score", f"--model={model}", "--layer-wise", "--criteria=all", *data, out])
    return {"seconds": seconds, "peak_bytes": peak}


def beyond_imports(command: str, model: Path, repeats: int) -> float:
    """Median seconds of a command minus those of its imports."""
    imports = f"import moe_reduce, moe_reduce.commands.{command}, moe_reduce.planning.flops, moe_reduce.models.decoder"
    total = [measured([*COMMAND, command, f"--model={model}"])[0] for _ in range(repeats)]
    bare = [measured([sys.executable, "-c", imports])[0] for _ in range(repeats)]
    return float(np.median(total) - np.median(bare))


if __name__ == "__main__":
    main()
