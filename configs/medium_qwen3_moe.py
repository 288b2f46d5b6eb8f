"""The model that configs/reduce_medium.py reduces: configs/small_qwen3_moe.py, larger, for one GPU.

64 experts in each of 8 layers, 8 of them active for a token; 27.4M parameters.
Cost: 41M tokens, 70 seconds on an H100 in bf16, after downloading 50 MB of text.
Expected: validation loss 2.187 on the textbooks of docs/results/reduce_medium.
Command: moe-reduce train --config=configs/medium_qwen3_moe.py --workdir=runs/medium_qwen3_moe
"""

import ml_collections

from configs import small_qwen3_moe


def get_config() -> ml_collections.ConfigDict:
    """Wider, deeper, and with more experts."""
    config = small_qwen3_moe.get_config()
    config.model.update(layers=8, width=256, query_heads=4, key_value_heads=2, head_width=64, init_std=0.03)
    config.model.moe.update(experts=64, active=8, width=64)
    config.train.update(
        steps=5000, batch_size=64, learning_rate=3e-3, final_learning_rate=3e-4, evaluate_every=1000,
        evaluate_batches=16, checkpoint_every=5000,
    )  # fmt: skip
    config.execution.update(platform="gpu", compute_dtype="bfloat16", scan_unroll=8)
    return config
