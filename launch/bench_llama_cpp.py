"""Decoding speed beside llama.cpp on the same model and as many threads, in turns: int8 and Q8_0, int4 and Q4_0.

llama.cpp runs through launch/llama_cpp.mjs, which says what it needs. Both sides decode the same prompt of token ids
greedily at batch 1, and only tokens after the first count. Threads of llama.cpp wait for each other at every matrix, so
on a busy machine compare one thread on one core.

Command: NODE_LLAMA_CPP=DIR taskset -c 0 python launch/bench_llama_cpp.py --model=runs/smollm2 --threads=1
(writes docs/results/llama_cpp)
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from decoding import PROMPT, Decoder
from side_by_side import RESULTS, Run, Side, publish

LAUNCH, SCRIPT = Path(__file__).resolve().parent, "launch/bench_llama_cpp.py"
PAIRS = {"int8": "q8_0", "int4-g32": "q4_0"}  # formats with as many bits a weight, or nearly
BFLOAT16 = "bfloat16"


def ours(model: Path, kind: str, tokens: int) -> tuple[Run, dict[str, int]]:
    """Decoding by a model of this kind, as `Decoder` has it; a run returns its tokens/s."""
    decoder = Decoder(model, kind, tokens)

    def run() -> float:
        stream = decoder.chunks()
        next(stream)
        started = time.perf_counter()
        made = sum(len(row) for (row,) in stream)
        return made / (time.perf_counter() - started)

    return run, decoder.facts()


def llama_cpp(file: Path, tokens: int, threads: int) -> dict[str, Any]:
    """What launch/llama_cpp.mjs prints."""
    command = ["node", str(LAUNCH / "llama_cpp.mjs"), f"--model={file}", f"--ids={','.join(map(str, PROMPT))}"]
    command += [f"--tokens={tokens}", f"--threads={threads}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def exported(model: Path, kind: str, scratch: Path) -> Path:
    """Writes the model as GGUF."""
    from moe_reduce.__main__ import main as command

    out = scratch / kind
    if command(["export", f"--model={model}", "--format=gguf", f"--type={kind}", f"--out={out}"]):
        raise SystemExit(f"cannot export {model} as {kind}")
    return out / "model.gguf"


def main() -> None:
    """Measures and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "llama_cpp", help="directory of the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = {kind: exported(given.model, kind, Path(name)) for kind in PAIRS.values()}
        sides = {kind: Side(ours, given.model, kind, given.tokens) for kind in (BFLOAT16, *PAIRS)}
        release = ""
        speeds: dict[str, list[float]] = {kind: [] for kind in (*sides, *files)}
        for _ in range(given.repeats):
            for kind, side in sides.items():
                side()
                speeds[kind].append(float(side.losses[-1]))
            for kind, file in files.items():
                theirs = llama_cpp(file, given.tokens, given.threads)
                speeds[kind].append(theirs["decode_tokens_per_second"])
                release = theirs["llama_cpp"]
        sizes = {kind: file.stat().st_size for kind, file in files.items()}
    for side in sides.values():
        side.end()
    median = {kind: float(np.median(found)) for kind, found in speeds.items()}
    rows = [
        [kind, f"{sides[kind].facts['bytes'] / 1e6:.0f} MB", f"{median[kind]:.1f} tokens/s",
         peer.upper(), f"{sizes[peer] / 1e6:.0f} MB", f"{median[peer]:.1f} tokens/s",
         f"{median[kind] / median[peer]:.2f}×", f"{median[kind] / median[BFLOAT16]:.2f}×"]
        for kind, peer in PAIRS.items()
    ]  # fmt: skip
    publish(
        given.out,
        {
            "title": f"Decoding {given.model.name} beside llama.cpp {release}, threads: {given.threads}, batch 1",
            "command": f"NODE_LLAMA_CPP=DIR python {SCRIPT} --model=runs/smollm2 --threads={given.threads}",
            "columns": ["ours", "weights", "decoding", "llama.cpp", "file", "decoding", "ratio", "beside our bf16"],
            "rows": rows,
            "aims": {"ratio": 0.6, "beside our bf16": 1.3},
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {name: metadata.version(name) for name in ("jax", "numpy")},
            "tokens_per_second": speeds,
        },
    )


if __name__ == "__main__":
    main()
