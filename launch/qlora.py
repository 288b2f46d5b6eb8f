"""Table of the adaptations of configs/qlora_smollm2.py: losses beside the bytes of the base. Run it by qlora.sh."""

import argparse
from pathlib import Path
from typing import Any

from side_by_side import RESULTS, publish

from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.disk import read_json

BASE = "fp32"
COLUMNS = [
    "base", "bytes of the base", "of bf16", "trained parameters", "training tokens", "validation loss", "beside fp32",
    "perplexity merged", "requantised",
]  # fmt: skip


def main() -> None:
    """Collects the finished runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/qlora/runs"), help="workdirs by base (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "qlora_smollm2", help="directory of the result")
    given = parser.parse_args()
    runs = {file.parent.name: read_json(file) for file in sorted(given.runs.glob("*/summary.json"))}
    if BASE not in runs:
        parser.error(f"{given.runs} has no finished run of {BASE}: run ./launch/qlora.sh")
    found = {name: _figures(given.runs / name, run, runs[BASE]) for name, run in runs.items()}
    steps = read_json(given.runs / BASE / "config.json")["train"]["steps"]
    publish(
        given.out,
        {
            "title": f"LoRA over SmolLM2-135M and over its quantised forms, {steps} steps on WikiText-2",
            "command": "./launch/qlora.sh",
            "columns": COLUMNS,
            "rows": [_row(name, one) for name, one in sorted(found.items(), key=lambda item: -item[1]["base_bytes"])],
            "bases": found,
            "runs": runs,
        },
    )


def _figures(workdir: Path, run: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    import jax

    import moe_reduce

    model = moe_reduce.load(read_json(workdir / "config.json")["model"], execution=ExecutionConfig().resolve("cpu"))
    return {
        "base_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "bf16_bytes": 2 * run["parameters"],
        "trained": run["trained_parameters"],
        "tokens": run["tokens"],
        "loss": run["validation"]["loss"],
        "change": run["validation"]["loss"] / base["validation"]["loss"] - 1,
        "requantised": read_json(workdir / "equivalence.json").get("requantised"),
    }


def _row(name: str, found: dict[str, Any]) -> list[str]:
    cost = found["requantised"]
    merged = ["", ""] if cost is None else [f"{cost['perplexity'][key]:.2f}" for key in ("before", "after")]
    return [
        name,
        f"{found['base_bytes'] / 1e6:.1f} MB",
        f"{found['base_bytes'] / found['bf16_bytes']:.1%}",
        f"{found['trained']:,}",
        f"{found['tokens']:,}",
        f"{found['loss']:.4f}",
        f"{found['change']:+.2%}" if name != BASE else "",
        *merged,
    ]


if __name__ == "__main__":
    main()
