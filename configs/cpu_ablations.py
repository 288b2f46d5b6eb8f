"""Ablations of configs/cpu_pair.py, one change a variant, 4.1M tokens each: what widens or closes the gap?

Cost: about 6 minutes a variant on one core. Expected: the table in docs/results/cpu_ablations.
Command: ./launch/shared_moe.sh, or moe-reduce train --config=configs/cpu_ablations.py --workdir=runs/cpu_ablations
"""

import ml_collections

from configs import cpu_pair


def get_config() -> ml_collections.ConfigDict:
    """The pair, and the pair with one change each."""
    config = cpu_pair.get_config()
    config.train.update(steps=1000, evaluate_every=100, checkpoint_every=500)
    changes = {
        "dense": cpu_pair.dense(),
        "shared_moe": {},
        "eight_top_4": _pool(experts=8, width=45, active=4),
        "sixteen_top_8": _pool(experts=16, width=22, active=8),
        "four_router_per_layer": _pool(width=90, router="layer"),
        "eight_top_4_router_per_layer": _pool(experts=8, width=43, active=4, router="layer"),
        "sixteen_top_8_router_per_layer": _pool(experts=16, width=20, active=8, router="layer"),
        "output_gain": _pool(output_gain=True, width=91),
        "dense_of_equal_parameters": {"model": {"moe": None, "feed_forward_width": 46}},
        "one_expert": _pool(experts=1, active=1, width=368),
        "sigmoid": _pool(score_function="sigmoid", normalize=False),
        "init_half": _pool(init_scale=0.5),
        "init_double": _pool(init_scale=2.0),
        "balance_none": {"balance": {"loss": "none"}},
        "balance_per_call": {"balance": {"loss": "per_call"}},
        "balance_bias": _pool(selection_bias=True, width=91) | {"balance": {"loss": "none", "bias_rate": 0.01}},
        "sixteen_top_2": _pool(experts=16, width=22),
        "pool_rate_half": {"train": {"expert_learning_rate_scale": 0.5}},
        "pool_rate_double": {"train": {"expert_learning_rate_scale": 2.0}},
        "factorised_embedding": {"model": {"embedding_factor": 32, "moe": {"width": 124}}},
        "dense_rate_half": cpu_pair.dense() | _rate(4e-3),
        "shared_moe_rate_half": _rate(4e-3),
        "dense_rate_double": cpu_pair.dense() | _rate(16e-3),
        "shared_moe_rate_double": _rate(16e-3),
    }
    config.variants = ml_collections.ConfigDict(changes)
    return config


def _pool(**changes) -> dict:
    return {"model": {"moe": changes}}


def _rate(peak: float) -> dict:
    return {"train": {"learning_rate": peak, "final_learning_rate": peak / 10}}
