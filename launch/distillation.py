"""Table of the reductions of configs/distillation.py: quality and bytes after every step. Run it by distillation.sh."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import RESULTS, publish

from moe_reduce.core.disk import read_json
from moe_reduce.reports.summaries import spread

COLUMNS = [
    "variant", "step", "training tokens", "seeds", "parameters", "bytes", "of the first", "validation loss",
    "accuracy kept",
]  # fmt: skip


def main() -> None:
    """Collects the finished runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"), help="workdirs by seed (%(default)s)")
    parser.add_argument("--made-by", default="./launch/distillation.sh", help="command shown with the table")
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation", help="directory of the result")
    given = parser.parse_args()
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for file in sorted(given.runs.glob("seed*/*/summary.json")):
        runs.setdefault(file.parent.name, []).append(_stages(file.parent))
    if not runs:
        parser.error(f"{given.runs} has no finished run: run ./launch/distillation.sh")
    text = read_json(next(given.runs.glob("seed*/*/summary.json")))["data"]["source"]
    publish(
        given.out,
        {
            "title": "A small Qwen3-MoE, pruned to a fifth of its experts, recovered and rounded",
            "command": given.made_by,
            "columns": COLUMNS,
            "rows": _rows(runs),
            "text": text,
            "runs": runs,
        },
    )


def _stages(workdir: Path) -> list[dict[str, Any]]:
    """What the table needs of each stage; bytes are those of the files."""
    found = []
    for number, stage in enumerate(read_json(workdir / "summary.json")["stages"]):
        model = workdir / f"{number:02d}-{stage['name']}" / "model"
        size = sum(file.stat().st_size for file in model.glob("*.safetensors")) if number else stage["bytes"]
        kept = {name: stage[name] for name in ("name", "tokens", "parameters", "validation")}
        found.append(kept | {"bytes": size})
    return found


def _rows(runs: dict[str, list[list[dict[str, Any]]]]) -> list[list[str]]:
    """A row for each step of each variant; steps that variants share appear once."""
    rows, seen = [], set()
    for name, seeds in runs.items():
        first = [stages[0] for stages in seeds]
        for number in range(len(seeds[0])):
            here = [stages[number] for stages in seeds]
            key = tuple((stage["name"], stage["validation"]["loss"]) for stage in here)
            if key in seen:
                continue
            seen.add(key)
            shared = here[0]["name"] in ("original", "prune")
            rows.append(["" if shared else name, *_cells(first, here, seeds, number)])
    return rows


def _cells(first: list[Any], here: list[Any], seeds: list[list[Any]], number: int) -> list[str]:
    tokens = sum(stage["tokens"] for stage in seeds[0][: number + 1])
    accuracy = [stage["validation"]["accuracy"] for stage in here]
    kept = np.mean(accuracy) / np.mean([stage["validation"]["accuracy"] for stage in first])
    return [
        here[0]["name"],
        f"{tokens / 1e6:.1f} M",
        str(len(here)),
        f"{here[0]['parameters']:,}",
        f"{here[0]['bytes'] / 1e3:,.0f} kB",
        f"{here[0]['bytes'] / first[0]['bytes']:.1%}",
        spread([stage["validation"]["loss"] for stage in here], ".3f"),
        f"{kept:.1%}",
    ]


if __name__ == "__main__":
    main()
