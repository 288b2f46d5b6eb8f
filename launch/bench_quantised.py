"""Median speed of decoding one text with quantised weights on this machine, beside fp32 and bf16.

Each format has its own process, and runs alternate. The model is SmolLM2-135M (launch/smollm2.sh), or any other.

Command: python launch/bench_quantised.py --model=runs/smollm2    (writes docs/results/quantised/summary.json)
"""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import side_by_side
from decoding import Decoder
from side_by_side import RESULTS, Run, publish

FORMATS = "float32,bfloat16,int8,int4-g64,fp8,nf4,mxfp4,ternary"


def decoding(directory: Path, kind: str, tokens: int) -> tuple[Run, dict[str, int]]:
    """A text by a model of this kind, as `Decoder` has it."""
    decoder = Decoder(directory, kind, tokens)
    return decoder.run, decoder.facts()


def main() -> None:
    """Measures and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--formats", default=FORMATS, help="dtypes and schemes, comma separated (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantised", help="directory of the result")
    given = parser.parse_args()
    kinds = given.formats.split(",")
    builds = {kind: (decoding, given.model, kind, given.tokens) for kind in kinds}
    seconds, facts = side_by_side.compare(builds, given.repeats)
    cells, measured = [], {}
    for kind in kinds:
        speed, size = given.tokens / seconds[kind], facts[kind]["bytes"]
        row: dict[str, Any] = {"tokens_per_second": speed, "bytes": size, "bytes_per_second": speed * size}
        row |= {f"ratio_to_{base}": seconds[base] / seconds[kind] for base in ("float32", "bfloat16") if base in kinds}
        measured[kind] = row
        ratios = [f"{value:.2f}×" for name, value in row.items() if name.startswith("ratio")]
        cells.append([kind, f"{size / 1e6:.1f} MB", f"{speed:.1f} tokens/s", f"{speed * size / 1e9:.2f} GB/s", *ratios])
    bases = [f"beside {base}" for base in ("float32", "bfloat16") if base in kinds]
    publish(
        given.out,
        {
            "title": f"Decoding with quantised weights on CPU, {given.model.name}",
            "command": f"python launch/bench_quantised.py --model={given.model}",
            "columns": ["weights", "bytes", "decoding, batch 1", "weights read", *bases],
            "rows": cells,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {name: metadata.version(name) for name in ("jax", "numpy")},
            "decoding": measured,
        },
    )


if __name__ == "__main__":
    main()
