"""Draws the pictures of text_to_lora.sh -> docs/results/text_to_lora: maps of adapters, and errors by tasks."""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from moe_reduce.adapters.hypernetwork import conditioning, directory
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork.tasks import read_tasks
from moe_reduce.core import trees
from moe_reduce.core.errors import UserError
from moe_reduce.reports import text_to_lora_pictures

OUT = Path("docs/results/text_to_lora")


def main() -> int:
    """Returns 2 after a line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", required=True, type=Path)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--maps", nargs="*", default=[], help="variants whose adapters are drawn, HEAD_SEED")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        for name in arguments.maps:
            map_of(arguments.workdir / name, arguments.tasks, OUT / f"map_{name}.png")
        curves = relative_errors(arguments.workdir)
        if curves:
            text_to_lora_pictures.by_tasks(curves, "relative L1 of ΔW", OUT / "reconstruction.png")
    except UserError as error:
        print(f"text_to_lora_pictures.py: {error}", file=sys.stderr)
        return error.status
    return 0


def map_of(workdir: Path, tasks: Path, file: Path) -> None:
    """Draws the adapters that a hypernetwork writes for the first description of every task."""
    trained = directory.load(workdir / "hypernetwork")
    config = json.loads((workdir / "config.json").read_text())
    splits = json.loads((workdir / "splits.json").read_text())
    described = read_tasks(tasks, names=[*splits["train"], *splits["unseen"]])
    encoding = conditioning.of_trained(trained, Path(config["tasks"]["cache"]))
    embeddings_ZW = np.concatenate([encoding.embeddings(task)[:1] for task in described])
    adapters = hypernetworks.written(trained.hypernetwork, embeddings_ZW)
    values_ZX = [np.concatenate([leaf.ravel() for leaf in emitted(adapter.tree)]) for adapter in adapters]
    categories = [task.categories[0] if task.categories else "none" for task in described]
    unseen = [task.name in splits["unseen"] for task in described]
    text_to_lora_pictures.adapter_map(values_ZX, categories, unseen, file)


def emitted(tree: dict) -> list[np.ndarray]:
    """Leaves of an adapter that differ between tasks: factors or cores."""
    names = ("in/matrix", "out/matrix", "core")
    flat = trees.flatten(tree)
    with_core = any(path.endswith("/core") for path in flat)
    chosen = names[2:] if with_core else names[:2]
    return [np.asarray(leaf) for path, leaf in flat.items() if path.endswith(chosen)]


def relative_errors(workdir: Path) -> dict[str, dict[int, float]]:
    """{"HEAD, CONDITIONING": {tasks: relative L1}} of the finished reconstructions."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted(workdir.glob("copy_*/summary.json")):
        head, conditioned, size = re.fullmatch(r"copy_(\w+?)_(text|one_hot|both)_(\d+)", file.parent.name).groups()
        found[f"{head}, {conditioned}"][int(size)] = json.loads(file.read_text())["validation"]["relative_l1"]
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
