"""UUID memorisation: random keys and values learned by heart, by LoRA, SkeMA and the whole model (METHODS 3).

Accuracy is of the characters of greedily decoded values: `recall_train` on pairs that are learned, `recall_validation`
on pairs that are not, whose values nobody can know: chance. Each method at each size tries the same number of learning
rates. For Pythia-160M: --config.model=DIR, --config.data.source=uuid-pairs:1100, --config.adapter.targets=q,v and a
budget of 0.002 (LoRA r=8: 294,912 parameters; SkeMA k=116: 322,944).
Cost: three minutes a variant on one core. Expected: docs/adapters.md.
Command: ./launch/adapters.sh, or
moe-reduce adapt --config=configs/adapt_uuid.py --workdir=runs/adapt_uuid --variant=skema_100_rate_300
"""

import ml_collections

from moe_reduce.core import config as defaults

BUDGETS = (0.0005, 0.002, 0.01)  # of the base's parameters; the first pays for no rank of LoRA
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FULL_RATES = (1e-3, 3e-3, 1e-2)


def get_config() -> ml_collections.ConfigDict:
    """Adapters on queries and outputs of all layers, and everything beside them."""
    config = defaults.adapt_base()
    config.model = "runs/small_qwen3_moe/model"
    config.adapter.targets = "q,o"  # square here, so that both methods can spend every budget
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
    """Method, budget and rate, both in ten-thousandths -> the keys that they set."""
    found = {}
    for budget in BUDGETS:
        for method in ("lora", "skema") if budget > BUDGETS[0] else ("skema",):
            for rate in RATES:
                keys = {"adapter": {"method": method}, "budget": budget, "train": {"learning_rate": rate}}
                found[f"{method}_{10_000 * budget:.0f}_rate_{10_000 * rate:.0f}"] = keys
    for rate in FULL_RATES:
        found[f"full_rate_{10_000 * rate:.0f}"] = {"adapter": None, "budget": None, "train": {"learning_rate": rate}}
    return found
