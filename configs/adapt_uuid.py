"""UUID memorisation: random keys and values learned by heart, by LoRA and by SkeMA of equal size (METHODS 3).

Accuracy is of the characters of greedily decoded values: `recall_train` on pairs that are learned, `recall_validation`
on pairs that are not, whose values nobody can know: chance. For Pythia-160M: --config.model=DIR, uuid-pairs:1100 and a
budget of 0.002 (LoRA r=8: 294,912; SkeMA k=116: 322,944).
Cost: a minute or two a variant on one core. Expected: docs/adapters.md.
Command: ./launch/adapters.sh, or
moe-reduce adapt --config=configs/adapt_uuid.py --config.model=runs/cpu_pair_large/dense/model --workdir=runs/adapt_uuid
"""

import ml_collections

from moe_reduce import config as defaults

METHODS = {
    "lora": {"adapter": {"method": "lora"}},
    "skema": {"adapter": {"method": "skema"}},
    "full": {"adapter": None, "budget": None},
}


def get_config() -> ml_collections.ConfigDict:
    """Adapters on queries and values of all layers, and the whole model beside them."""
    config = defaults.adapt_base()
    config.model = "runs/cpu_pair_large/dense/model"
    config.budget = 0.002
    config.adapter.targets = "q,v"
    config.data.update(source="uuid-pairs:128", sequence_length=96, validation_fraction=0.5)
    config.recall_pairs = 64
    config.train.update(
        steps=900, batch_size=16, learning_rate=1e-2, final_learning_rate=0.0, warmup_steps=20, evaluate_every=100,
        evaluate_batches=4, checkpoint_every=300,
    )  # fmt: skip
    config.execution.scan_unroll = 8
    config.variants = ml_collections.ConfigDict(METHODS)
    return config
