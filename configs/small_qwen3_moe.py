"""The model that configs/reduce_small.py reduces: Qwen3-MoE's architecture at CPU size, on English textbooks.

40 small experts in each of 6 layers, 4 of them active for a token. It trains until experts differ: while they are
interchangeable, no criterion can tell which ones to prune.
Cost: 24.6M tokens, about 35 minutes on one core, after downloading 50 MB of text.
Expected: validation loss 2.73 on the textbooks of docs/results/reduce_small.
Command: moe-reduce train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe
"""

import ml_collections

from configs import cpu_pair
from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """One model, of a size that a CPU trains well."""
    config = cpu_pair.get_config()
    config.model.update(layers=6, qk_norm=True, tied_embeddings=False, rope_theta=1e6)
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=40, active=4, width=32)
    config.balance.loss = "per_call"
    config.train.update(steps=6000, evaluate_every=250, checkpoint_every=500)
    config.execution.scan_unroll = 6
    config.variants = ml_collections.ConfigDict()
    return config
