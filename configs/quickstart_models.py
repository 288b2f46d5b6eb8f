"""Two small models for the quick start: a dense one, and a mixture of experts that costs about as much to run.

Both read 0.8M tokens of the Python standard library's source. Each layer of the mixture has its own router and 16
experts, 4 of them active for a token; the active experts together are as wide as the dense feed-forward block. Each
of the 4 has a weight near a quarter, so experts start larger and learn faster than the dense block.
Cost: about a minute a model on 2 cores. Expected: validation loss near 2.97 nats a token for both.
Command: ./launch/quickstart.sh, or
moe-reduce train --config=configs/quickstart_models.py --workdir=runs/quickstart/models
"""

import ml_collections

from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """Both models, for the same tokens."""
    config = defaults.base()
    config.model.update(
        vocab_size=1024, layers=3, width=128, query_heads=4, key_value_heads=2, head_width=32, qk_norm=True,
        tied_embeddings=False, init_std=0.05,
    )  # fmt: skip
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=16, active=4, width=64, init_scale=2.0)
    config.data.update(source="python-stdlib", sequence_length=128)
    config.balance.loss = "per_call"
    config.train.update(
        steps=200, batch_size=32, learning_rate=6e-3, final_learning_rate=6e-4, warmup_steps=20,
        expert_learning_rate_scale=2.0, evaluate_every=50, evaluate_batches=16, checkpoint_every=50,
    )  # fmt: skip
    config.execution.scan_unroll = 3
    dense = {"model": {"moe": None, "feed_forward_width": 256}}
    config.variants = ml_collections.ConfigDict({"dense": dense, "mixture": {}})
    return config
