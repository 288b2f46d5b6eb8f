"""Pruning from file to file: time beside copying the kept bytes, in turn, and peak resident memory.

Command: python launch/bench_prune.py [--model DIR] (default: a synthetic 7.4 GB Qwen3-MoE, written first and removed);
writes docs/results/prune/summary.json.
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

from moe_reduce.storage.hf_config import read_config

ROOT = Path(__file__).parent.parent
CHUNK = 4 * 1024**2


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
    """Random scores of the model's shape: which experts are kept does not change the cost."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/prune/summary.json")
    parser.add_argument("--repeats", type=int, default=3)
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
    """Prunes to half and copies as many bytes, in turn; medians."""
    write_scores(model, scratch / "scores.json")
    pruned = scratch / "pruned"
    command = [sys.executable, "-m", "moe_reduce", "prune", f"--model={model}", f"--scores={scratch / 'scores.json'}"]
    prunes, copies, peak, kept = [], [], 0, 0
    for _ in range(repeats):
        seconds, memory = measured([*command, "--keep=0.5", f"--out={pruned}"])
        prunes.append(seconds)
        peak, kept = max(peak, memory), weights_bytes(pruned)
        shutil.rmtree(pruned)
        copies.append(copy(model, scratch / "copied", kept))
        shutil.rmtree(scratch / "copied")
    ratio = float(np.median(prunes) / np.median(copies))
    before = weights_bytes(model)
    cells = [
        f"{before / 1e9:.1f} GB to {kept / 1e9:.1f} GB", f"{np.median(prunes):.1f} s", f"{np.median(copies):.1f} s",
        f"{ratio:.2f}×", f"{peak / 1e9:.2f} GB",
    ]  # fmt: skip
    return {
        "title": "Pruning half of the experts, from file to file, beside copying the kept bytes",
        "command": "python launch/bench_prune.py",
        "columns": ["checkpoint", "prune", "copy", "ratio (aim: at most 2.5)", "peak memory (aim: under 1 GB)"],
        "rows": [cells],
        "prune_seconds": prunes,
        "copy_seconds": copies,
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    main()
