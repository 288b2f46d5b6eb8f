"""A dense LLaMA of 12 layers and 137,841,408 parameters (tied embeddings), on FineWeb-Edu.

The baseline of configs/shared_moe_50m.py: 12,000 steps of 512 x 1,024 tokens (6.3 billion) for a TPU v4-32. The name
125M counts two matrices in a feed-forward block; SwiGLU has three.
Cost: 5.6e18 FLOPs, one to two hours on a TPU v4-32, after some hours of tokenizing (raise data.workers).
Expected: a training loss near 3.12, as reported by the authors of the experiment; not run by this project.
Command: moe-reduce train --config=configs/dense_llama_125m.py --workdir=/a/shared/disk/dense --distributed
"""

import ml_collections

from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """The dense model, and the training recipe that both models share."""
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
