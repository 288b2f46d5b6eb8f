"""What closes the gap of configs/cpu_pair.py early: one change at a time, 1.6M tokens each.

Cost: about 4 minutes a variant on one core. Expected: docs/shared_moe.md.
Command: moe-reduce train --config=configs/cpu_ablations.py --workdir=runs/cpu_ablations
"""

import ml_collections

from configs import cpu_pair


def get_config() -> ml_collections.ConfigDict:
    """The pair and its neighbours."""
    config = cpu_pair.get_config()
    config.train.update(steps=400, warmup_steps=50, evaluate_every=50, checkpoint_every=100)
    small = {"moe": None, "feed_forward_width": 256}  # the baseline's blocks with our attention and embedding
    best = {"active": 6, "router": "layer", "output_gain": True}
    changes = {
        "dense": cpu_pair.dense(),
        "dense_small_embedding": {"model": small, "execution": {"scan_unroll": 6}},
        "shared_moe": {},
        "router_per_layer": {"model": {"moe": {"router": "layer"}}},
        "output_gain": {"model": {"moe": {"output_gain": True}}},
        "init_half": {"model": {"moe": {"init_scale": 0.5}}},
        "init_double": {"model": {"moe": {"init_scale": 2.0}}},
        "pool_rate_half": {"train": {"expert_learning_rate_scale": 0.5}},
        "pool_rate_double": {"train": {"expert_learning_rate_scale": 2.0}},
        "balance_per_call": {"balance": {"loss": "per_call"}},
        "balance_none": {"balance": {"loss": "none"}},
        "balance_bias": {
            "balance": {"loss": "none", "bias_rate": 0.01},
            "model": {"moe": {"selection_bias": True}},
        },
        "top_4": {"model": {"moe": {"active": 4}}},
        "top_6": {"model": {"moe": {"active": 6}}},
        "top_6_router_gain": {"model": {"moe": best}},
    }
    config.variants = ml_collections.ConfigDict(changes)
    return config
