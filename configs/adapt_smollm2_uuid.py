"""UUID memorisation on a published model, SmolLM2-135M-Instruct: LoRA, SkeMA and full fine-tuning.

1,000 random pairs of UUIDs are learned, and 100 others are the control, where only chance is possible. Recall is
measured every 100 steps, so that 300, 500, 700 and 900 steps can be compared. LoRA has rank 8 on queries and values of
all layers, 460,800 parameters; SkeMA has as many (k = 87), or as much arithmetic (k = 8). Cores that start at zero, at
random or as a product of two thin factors, and the three kinds of projections, share one budget.
The base is runs/smollm2, from ./launch/smollm2.sh.
Cost: 900 steps of 16 x 96 tokens a variant, two hours on two cores. Expected: not run yet; ./launch/adapters.sh makes
the table.
Command: TASKS=smollm2_uuid ./launch/adapters.sh, or
moe-reduce adapt --config=adapt_smollm2_uuid --workdir=runs/adapt_smollm2_uuid --variant=skema_87_rate_300
"""

import ml_collections

from configs import adapt_uuid

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (1e-5, 3e-5, 1e-4)
KINDS = {
    "random_core": {"core_std": 0.02},
    "low_rank_core": {"core": "low_rank", "core_rank": 43},  # 2 · 87 · 43 numbers, close to 87²
    "gaussian": {"projection": "gaussian"},
    "srht": {"projection": "srht"},
    "dropout": {"method": "lora", "sketch_width": None, "rank": 8, "dropout": 0.05},
}


def get_config() -> ml_collections.ConfigDict:
    """Adapters on queries and values of all layers, and full fine-tuning."""
    config = adapt_uuid.get_config()
    config.model = "runs/smollm2"
    config.adapter.targets = "q,v"
    config.data.update(source="uuid-pairs:1100", validation_fraction=100 / 1100)
    config.recall_pairs = 100
    config.train.update(evaluate_every=100, checkpoint_every=300)
    config.variants = ml_collections.ConfigDict(variants())
    return config


def variants() -> dict:
    """Keys by variant; names hold the method, its size, and the learning rate in ten-thousandths."""
    sizes = {
        "lora_8": {"method": "lora", "rank": 8},
        "skema_87": {"method": "skema", "sketch_width": 87},
        "skema_8": {"method": "skema", "sketch_width": 8},
    }
    found = {}
    for name, adapter in sizes.items():
        for rate in RATES:
            found[f"{name}_rate_{10_000 * rate:.0f}"] = {"adapter": adapter, "train": {"learning_rate": rate}}
    for name, changes in KINDS.items():
        adapter = {"method": "skema", "sketch_width": 87} | changes
        found[f"{name}_rate_100"] = {"adapter": adapter, "train": {"learning_rate": 1e-2}}
    for rate in FULL_RATES:
        keys = {"adapter": None, "train": {"learning_rate": rate}}
        found[f"full_rate_{1_000_000 * rate:.0f}_millionths"] = keys
    return found
