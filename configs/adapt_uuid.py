"""UUID memorisation: random pairs of keys and values, learned with LoRA, SkeMA and full fine-tuning.

Accuracy is the share of correct characters in greedily decoded values: `recall_train` on learned pairs, and
`recall_validation` on pairs that were not learned, where only chance is possible. Each method at each size tries the
same learning rates. For Pythia-160M: --config.model=DIR, --config.data.source=uuid-pairs:1100,
--config.adapter.targets=q,v and a budget of 0.002 (LoRA r=8: 294,912 parameters; SkeMA k=116: 322,944).
The base is runs/small_qwen3_moe/model, from configs/small_qwen3_moe.py. For any other model: configs/adapt.py.
Cost: three minutes a variant on one core. Expected: the table in docs/results/adapt_uuid.
Command: ./launch/adapters.sh, or
moe-reduce adapt --config=configs/adapt_uuid.py --workdir=runs/adapt_uuid --variant=skema_100_rate_300
"""

import ml_collections

from moe_reduce.core import config as defaults

BUDGETS = (0.0005, 0.002, 0.01)  # share of the base's parameters; the first is below rank 1 of LoRA
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FULL_RATES = (1e-3, 3e-3, 1e-2)


def get_config() -> ml_collections.ConfigDict:
    """Adapters on query and output projections of all layers, and full fine-tuning."""
    config = defaults.adapt_base()
    config.model = "runs/small_qwen3_moe/model"
    config.adapter.targets = "q,o"  # square here, so that both methods can use every budget
    config.data.update(source="uuid-pairs:64", sequence_length=96, validation_fraction=0.5)
    config.recall_pairs = 32
    config.train.update(
        steps=900, batch_size=16, learning_rate=1e-2, final_learning_rate=0.0, warmup_steps=20, evaluate_every=300,
        evaluate_batches=2, checkpoint_every=900,
    )  # fmt: skip
    config.execution.scan_unroll = 6
    config.variants = ml_collections.ConfigDict(variants())
    return config


def variants() -> dict:
    """Keys by variant; names hold the method, the budget and the learning rate (both in ten-thousandths)."""
    found = {}
    for budget in BUDGETS:
        for method in ("lora", "skema") if budget > BUDGETS[0] else ("skema",):
            for rate in RATES:
                keys = {"adapter": {"method": method}, "budget": budget, "train": {"learning_rate": rate}}
                found[f"{method}_{10_000 * budget:.0f}_rate_{10_000 * rate:.0f}"] = keys
    for rate in FULL_RATES:
        found[f"full_rate_{10_000 * rate:.0f}"] = {"adapter": None, "budget": None, "train": {"learning_rate": rate}}
    return found
