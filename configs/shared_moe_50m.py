"""A shared mixture of 49,642,240 parameters: 12 layers that call one pool of 16 experts through one router.

It has 36 % of the parameters of configs/dense_llama_125m.py and trains on the same 6.3 billion tokens.
Cost: 2.7e18 FLOPs, about an hour on a TPU v4-32, after tokenizing.
Expected: a training loss near 3.15 (baseline 3.12), as reported by the authors of the experiment; not run by this
project.
Command: moe-reduce train --config=configs/shared_moe_50m.py --workdir=/a/shared/disk/shared --distributed
"""

import ml_collections

from configs import dense_llama_125m
from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """The baseline's recipe with grouped heads, a factorised embedding and the pool."""
    config = dense_llama_125m.get_config()
    config.model.update(key_value_heads=4, embedding_factor=128, feed_forward_width=None)
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=16, active=2, width=720, placement="shared", router="shared")
    config.balance.update(loss="pooled", weight=0.01)
    return config
