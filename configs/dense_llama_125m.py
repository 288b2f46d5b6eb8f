"""The dense baseline of experiment 1: LLaMA of 12 layers, 137,841,408 parameters (tied), on FineWeb-Edu.

Its source calls it "125M", which counts two matrices a block; SwiGLU at 3072 has three. METHODS: 12,000 steps of
512 × 1024 tokens (6.3 billion) on a TPU v4-32; reported final loss 3.12.
Cost: 5.6e18 FLOPs, an hour or two on v4-32, and once some hours of tokenizing (raise data.workers). Expected: loss near
3.12.
Command: moe-reduce train --config=configs/dense_llama_125m.py --workdir=/a/shared/disk/dense --distributed
"""

import ml_collections

from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """The table's left column and the training recipe that both columns share."""
    config = defaults.base()
    config.model.update(
        vocab_size=32_000, layers=12, width=768, query_heads=12, key_value_heads=12, head_width=64,
        feed_forward_width=3072,
    )  # fmt: skip
    config.execution.update(platform="tpu", compute_dtype="bfloat16", remat="dots")
    config.data.update(source="hub:HuggingFaceFW/fineweb-edu:sample-10BT", sequence_length=1024)
    config.train.update(
        steps=12_000, batch_size=512, learning_rate=3e-4, final_learning_rate=3e-5, warmup_steps=1000,
        beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0, evaluate_every=500, checkpoint_every=500,
        evaluate_batches=16, log_every=20,
    )  # fmt: skip
    return config
