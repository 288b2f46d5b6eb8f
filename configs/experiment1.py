"""Experiment 1 with all of its parts, at a sixty-fourth and a sixteenth of the published size, on English textbooks.

Both sizes keep the published design: 12 layers, one pool of 16 SwiGLU experts, top-2, one router, query : key/value
heads 3 : 1, a tied embedding factorised at K = D/6. They keep its shares too: embedding 8.4 %, attention 38 %, pool
53 % (small, D = 96: 779,104 parameters; large, D = 192: 3,108,544). Each stands beside its dense baseline (multi-head
attention, SwiGLU of 4·D, whole tied embedding) and beside `_dense_of_equal_parameters`: the shared model with a
feed-forward block in each layer in place of the pool, 0.1 to 0.2 % smaller, since it has no router.
Cost: 10.2M tokens (small), 20.5M (large); hours on one core: see launch/experiment1.sh. Expected: not measured yet; at
published size 0.03 nats between dense and shared, and cpu_pair (whole embedding) 0.19 small, 0.07 large.
Command: ./launch/experiment1.sh, or
moe-reduce train --config=configs/experiment1.py --workdir=runs/experiment1/seed0 --variant=small_shared_moe
"""

import ml_collections

from configs import cpu_pair
from moe_reduce.core import config as defaults

LAYERS = 12
# width D, query heads, steps of 4,096 tokens, peak learning rate
SIZES = {"small": (96, 3, 2500, 6e-3), "large": (192, 6, 5000, 4e-3)}


def get_config() -> ml_collections.ConfigDict:
    """Return three models of each size, trained on the same data and number of tokens."""
    config = cpu_pair.get_config()
    config.model.update(layers=LAYERS, head_width=32, moe=None, feed_forward_width=None)
    config.execution.scan_unroll = LAYERS
    config.train.update(evaluate_every=250, checkpoint_every=500)
    found = {}
    for size, (width, heads, steps, peak) in SIZES.items():
        train = {"steps": steps, "learning_rate": peak, "final_learning_rate": peak / 10}
        for name, model in models(width, heads).items():
            found[f"{size}_{name}"] = {"model": model, "train": train}
    config.variants = ml_collections.ConfigDict(found)
    return config


def models(width: int, heads: int) -> dict:
    """Return the three models of a width, in proportion to the published ones of width 768."""
    common = {
        "vocab_size": 32_000 * width // 768,
        "width": width,
        "query_heads": heads,
        "init_std": round(0.5 * width**-0.5, 3),
    }
    saving = {"key_value_heads": heads // 3, "embedding_factor": width // 6}
    expert = 720 * width // 768
    pool = {"experts": 16, "active": 2, "width": expert, "placement": "shared", "router": "shared"}
    return {
        "dense": common | {"key_value_heads": heads, "feed_forward_width": 4 * width},
        "dense_of_equal_parameters": common | saving | {"feed_forward_width": 16 * expert // LAYERS},
        "shared_moe": common | saving | {"moe": defaults.moe_base().to_dict() | pool},
    }
