"""configs/cpu_pair.py four times as large: what the gap does with size, for the same 10.2M tokens.

Cost: about 40 minutes (dense) and 45 (shared) on one core each. Expected: docs/shared_moe.md.
Command: ./launch/shared_moe.sh, or moe-reduce train --config=configs/cpu_pair_large.py --workdir=runs/cpu_pair_large
"""

import ml_collections

from configs import cpu_pair


def get_config() -> ml_collections.ConfigDict:
    """Twice the width of the small pair, heads, feed-forward and pool in proportion."""
    config = cpu_pair.get_config()
    config.model.update(width=128, query_heads=4, init_std=0.045)
    config.model.moe.width = 280
    config.train.update(learning_rate=6e-3, final_learning_rate=6e-4)
    dense = cpu_pair.dense()
    dense["model"].update(feed_forward_width=512, key_value_heads=4)
    config.variants = ml_collections.ConfigDict({"dense": dense, "shared_moe": {}})
    return config
