"""A dense LLaMA and a shared MoE of under 40 % of its parameters, on the Python standard library, on a CPU.

Cost: about five minutes on 2 cores. Expected: see the results table of the README.
Command: ./launch/quickstart.sh
"""

import ml_collections

from moe_reduce import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """Both models, for the same tokens."""
    config = defaults.base()
    config.model.update(
        vocab_size=2048, layers=6, width=96, query_heads=6, key_value_heads=2, head_width=16, embedding_factor=32
    )
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=16, active=2, width=48, placement="shared", router="shared")
    config.execution.update(scan_unroll=6)
    config.data.update(sequence_length=256)
    config.train.update(
        steps=300, batch_size=16, learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=30, evaluate_every=50
    )
    dense = {"moe": None, "feed_forward_width": 384, "key_value_heads": 6, "embedding_factor": None}
    config.variants = ml_collections.ConfigDict({"dense": {"model": dense}, "shared_moe": {}})
    return config
