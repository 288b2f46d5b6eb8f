"""Compares the runs of text_to_lora.sh on unseen tasks, and writes their table -> docs/results/text_to_lora."""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from moe_reduce.__main__ import main as run
from moe_reduce.core import disk

OUT = Path("docs/results/text_to_lora")
TITLE = "Text-to-LoRA on SmolLM2-135M-Instruct: tasks that never trained, means over tasks (and ± over seeds)"
FIGURES = {"loss": "loss (nats)", "exact_match": "exact match", "rouge_l": "ROUGE-L"}


def main() -> int:
    """Returns the exit status of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--runs", nargs="+", required=True, help="variants, HEAD_SEED or multitask_SEED")
    arguments = parser.parse_args()
    figures = arguments.workdir / "unseen.json"
    words = [
        "evaluate-tasks",
        "--model=runs/smollm2",
        f"--run={arguments.workdir}/oracles",
        f"--out={figures}",
        "--overwrite",
    ]
    words += [f"--average={arguments.workdir}/oracles", f"--oracles={arguments.workdir}/oracles_unseen"]
    for name in arguments.runs:
        place = arguments.workdir / name
        if name.startswith("multitask"):
            words.append(f"--adapter={name}={place}/adapters/multitask")
        else:
            words.append(f"--hypernetwork={name}={place}/hypernetwork")
    status = run(words)
    if status == 0:
        OUT.mkdir(parents=True, exist_ok=True)
        disk.write_json(OUT / "summary.json", result(json.loads(figures.read_text())))
        print(OUT / "summary.json")
    return status


def result(content: dict[str, Any]) -> dict[str, Any]:
    """The table: one row for each condition, and for the seeds of a condition together."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for condition in content["conditions"]:
        groups[without_seed(condition["name"])].append(condition)
    columns = ["condition", "seeds", *FIGURES.values()]
    rows = [[name, str(len(found)), *(spread(found, figure) for figure in FIGURES)] for name, found in groups.items()]
    return {
        "title": TITLE,
        "command": "./launch/text_to_lora.sh TASKS",
        "columns": columns,
        "rows": rows,
        "runs": groups,
    }


def without_seed(name: str) -> str:
    """The name of a condition without the seed of its run: `L_0, own description` -> `L, own description`."""
    variant, separator, rest = name.partition(", ")
    head, _, seed = variant.rpartition("_")
    return (head if head and seed.isdigit() else variant) + separator + rest


def spread(found: list[dict[str, Any]], figure: str) -> str:
    """Mean of a figure over seeds, and half its range."""
    values = [one[figure] for one in found]
    scale, form = (1, ".4f") if figure == "loss" else (100, ".1f")
    text = f"{scale * statistics.mean(values):{form}}"
    half = scale * (max(values) - min(values)) / 2
    return text + (f" ± {half:{form}}" if len(values) > 1 else "") + ("" if figure == "loss" else " %")


if __name__ == "__main__":
    sys.exit(main())
