"""A dense LLaMA against a shared mixture of experts with 40 % of its parameters, at CPU size, on English textbooks.

All 8 layers of the mixture call one pool of 4 experts through one router, and its attention has grouped heads.
Cost: 10.2M tokens a model, about a quarter of an hour on one core each, after downloading 50 MB of text.
Expected: the mixture is about 0.19 nats behind (docs/results/cpu_pair, measured on other textbooks).
Command: ./launch/shared_moe.sh (three seeds), or moe-reduce train --config=configs/cpu_pair.py --workdir=runs/cpu_pair
Another text: --config.data.source='my/*.txt', or offline --config.data.source=python-stdlib.
"""

import ml_collections

from moe_reduce.core import config as defaults

TEXTBOOKS = "hub:HuggingFaceTB/cosmopedia:khanacademy"  # synthetic textbooks after the courses of Khan Academy


def get_config() -> ml_collections.ConfigDict:
    """Both models, for the same tokens."""
    config = defaults.base()
    config.model.update(
        vocab_size=1024, layers=8, width=64, query_heads=2, key_value_heads=1, head_width=32, init_std=0.06
    )
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=4, active=2, width=92, placement="shared", router="shared")
    config.data.update(source=TEXTBOOKS, sequence_length=128)
    config.train.update(
        steps=2500, batch_size=32, learning_rate=8e-3, final_learning_rate=8e-4, warmup_steps=100,
        evaluate_every=125, evaluate_batches=32, checkpoint_every=250,
    )  # fmt: skip
    config.execution.scan_unroll = 8
    config.variants = ml_collections.ConfigDict({"dense": dense(), "shared_moe": {}})
    return config


def dense() -> dict:
    """Keys of the dense baseline: a feed-forward block in place of the pool, and ungrouped heads."""
    model = {"moe": None, "feed_forward_width": 256, "key_value_heads": 2}
    return {"model": model}
