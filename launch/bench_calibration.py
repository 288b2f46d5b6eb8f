"""Peak resident memory of GPTQ from file to file, for mixtures of equal layers and different depth.

If layers are streamed, the peak does not grow with their number. What the process holds without a model, imports and
compiled programs, is measured on a mixture of one tiny layer.

Command: python launch/bench_calibration.py    (writes docs/results/calibration/summary.json)
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_files import COMMAND, ROOT, measured, weights_bytes
from side_by_side import RESULTS, publish

TINY = ("--layers=1", "--experts=8", "--width=128", "--hidden=64")
LAYERS = (2, 4, 8)
SHAPE = ("--experts=32", "--width=1024", "--hidden=512")
VOCABULARY = 32_000


def main() -> None:
    """Measures and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens (%(default)s)")
    parser.add_argument("--method", default="gptq", help="method of moe-reduce quantize (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration", help="directory of the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        without = quantised(given, scratch, "tiny", TINY)["peak"]
        models = {layers: quantised(given, scratch, str(layers), (f"--layers={layers}", *SHAPE)) for layers in LAYERS}
    few, many = (models[layers] for layers in (LAYERS[0], LAYERS[-1]))
    layer = (many["bytes"] - few["bytes"]) / (LAYERS[-1] - LAYERS[0])
    rows = [
        [str(layers), f"{one['bytes'] / 1e6:,.0f} MB", f"{one['peak'] / 1e6:,.0f} MB",
         f"{(one['peak'] - without) / layer:.1f} layers", f"{one['seconds']:.0f} s"]
        for layers, one in models.items()
    ]  # fmt: skip
    publish(
        given.out,
        {
            "title": f"Peak memory of {given.method.upper()} to int4, layers of {layer / 1e6:,.0f} MB in bf16, "
            f"{given.tokens:,} calibration tokens",
            "command": "python launch/bench_calibration.py",
            "columns": [
                "layers",
                "model",
                "peak memory",
                f"beyond the {without / 1e6:,.0f} MB of a tiny model",
                "time",
            ],
            "rows": rows,
            "layer_bytes": layer,
            "peak_of_a_tiny_model": without,
            "models": models,
        },
    )


def quantised(given: argparse.Namespace, scratch: Path, name: str, shape: tuple[str, ...]) -> dict[str, Any]:
    """Bytes of a synthetic mixture, and peak memory and seconds of quantising it."""
    model, tokens = scratch / name, scratch / "tokens.npy"
    subprocess.run([sys.executable, str(ROOT / "launch/synthetic_moe.py"), str(model), *shape], check=True)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (given.tokens // 256, 257))
    np.save(tokens, rows.astype(np.int32))
    command = [*COMMAND, "quantize", f"--model={model}", "--scheme=int4", f"--method={given.method}"]
    command += [f"--data={tokens}", "--batch-size=4", f"--out={scratch / f'{name}-int4'}"]
    seconds, peak = measured(command)
    return {"bytes": weights_bytes(model), "peak": peak, "seconds": seconds}


if __name__ == "__main__":
    main()
