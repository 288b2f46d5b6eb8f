"""The pair of configs/cpu_pair.py four times as large, on the same 10.2M tokens: does the gap shrink with size?

Cost: about 40 minutes (dense) and 45 minutes (shared) on one core each.
Expected: the mixture is about 0.07 nats behind (docs/results/cpu_pair_large).
Command: ./launch/shared_moe.sh, or moe-reduce train --config=configs/cpu_pair_large.py --workdir=runs/cpu_pair_large
"""

import ml_collections

from configs import cpu_pair


def get_config() -> ml_collections.ConfigDict:
    """Twice the width of the small pair; heads, feed-forward block and pool in proportion."""
    config = cpu_pair.get_config()
    config.model.update(width=128, query_heads=4, init_std=0.045)
    config.model.moe.width = 280
    config.train.update(learning_rate=6e-3, final_learning_rate=6e-4)
    dense = cpu_pair.dense()
    dense["model"].update(feed_forward_width=512, key_value_heads=4)
    config.variants = ml_collections.ConfigDict({"dense": dense, "shared_moe": {}})
    return config
