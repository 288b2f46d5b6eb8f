"""Collect plans of `moe-reduce plan --topology --json` into one table: docs/results/tpu_memory/summary.json.

Command: ./launch/plan_tpu.sh (makes the plans, then calls this script)
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLUMNS = [
    "step", "mesh", "batch", "trained and its optimiser", "frozen", "temporaries", "of a device's memory",
    "exchanged in a step", "cycles of what the compiler estimates", "compiled in",
]  # fmt: skip
GB = 1e9


def row(name: str, plan: dict[str, Any]) -> list[str]:
    """Row of one plan; bytes are per device."""
    held = plan["held_bytes"]
    trained = sum(held.get(kind, 0) for kind in ("trained_parameters", "optimizer", "average"))
    moved = {kind: f"{kind} {one['bytes'] / GB:.2f} GB" for kind, one in plan.get("collectives", {}).items()}
    fit = f"{plan['share_of_memory']:.0%}" if plan["fits"] else f"does not fit: {plan['remedy']}"
    return [
        name, plan["mesh"], plan["batch"], f"{trained / GB:.2f} GB", f"{held.get('frozen_parameters', 0) / GB:.2f} GB",
        f"{plan.get('temporaries_bytes', 0) / GB:.2f} GB", fit, ", ".join(moved.values()),
        f"{plan['estimated_cycles']['total'] / 1e6:,.0f} M" if plan["fits"] else "",
        f"{plan.get('compile_seconds', 0):.0f} s",
    ]  # fmt: skip


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path, metavar="PLAN.json", help="output of plan --topology --json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/tpu_memory", help="directory of the result")
    arguments = parser.parse_args()
    plans = {name: plan for file in arguments.plans for name, plan in json.loads(file.read_text()).items()}
    first = next(iter(plans.values()))
    result = {
        "title": f"Training steps compiled for {first['topology']}: {first['devices']} devices of "
        f"{first['memory_bytes'] / 2**30:.0f} GiB",
        "command": "./launch/plan_tpu.sh",
        "columns": COLUMNS,
        "rows": [row(name, plan) for name, plan in plans.items()],
        "plans": plans,
    }
    for cells in result["rows"]:
        print("  ".join(cells))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
