"""Experiment 1 at CPU size: dense LLaMA against a shared MoE of 40 % of its parameters, on English textbooks.

Cost: 10.2M tokens a model, about a quarter of an hour on one core each. Expected: docs/shared_moe.md.
Command: ./launch/shared_moe.sh (three seeds), or moe-reduce train --config=configs/cpu_pair.py --workdir=runs/cpu_pair
Data: ../shared/data/corpus where it is there; any text does: --config.data.source='my/*.txt'.
"""

import ml_collections

from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """Both models, for the same tokens."""
    config = defaults.base()
    config.model.update(
        vocab_size=1024, layers=8, width=64, query_heads=2, key_value_heads=1, head_width=32, init_std=0.06
    )
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=4, active=2, width=92, placement="shared", router="shared")
    config.data.update(source="../shared/data/corpus/openstax_prose.jsonl.gz", sequence_length=128)
    config.train.update(
        steps=2500, batch_size=32, learning_rate=8e-3, final_learning_rate=8e-4, warmup_steps=100,
        evaluate_every=125, evaluate_batches=32, checkpoint_every=250,
    )  # fmt: skip
    config.execution.scan_unroll = 8
    config.variants = ml_collections.ConfigDict({"dense": dense(), "shared_moe": {}})
    return config


def dense() -> dict:
    """What the baseline has in place of the pool and the grouped heads."""
    model = {"moe": None, "feed_forward_width": 256, "key_value_heads": 2}
    return {"model": model}
