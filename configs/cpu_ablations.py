"""What closes the gap of configs/cpu_pair.py early: one change at a time, 0.8M tokens each.

Cost: about 3 minutes a variant on one core. Expected: docs/shared_moe.md.
Command: ./launch/shared_moe.sh, or moe-reduce train --config=configs/cpu_ablations.py --workdir=runs/cpu_ablations
"""

import ml_collections

from configs import cpu_pair


def get_config() -> ml_collections.ConfigDict:
    """The pair and its neighbours."""
    config = cpu_pair.get_config()
    config.train.update(
        steps=200,
        learning_rate=3e-3,
        final_learning_rate=3e-4,
        warmup_steps=50,
        evaluate_every=50,
        checkpoint_every=200,
    )
    fast = {"learning_rate": 8e-3, "final_learning_rate": 8e-4}
    changes = {
        "dense": cpu_pair.dense(),
        "dense_fast": cpu_pair.dense() | {"train": fast},
        "shared_moe": {},
        "shared_moe_fast": {"train": fast},
        "one_expert": _pool(experts=1, active=1, width=368),
        "eight_experts": _pool(experts=8, width=46),
        "sixteen_experts": _pool(experts=16, width=23),
        "sixteen_experts_fast": _pool(experts=16, width=23) | {"train": fast},
        "sixteen_top_4": _pool(experts=16, width=23, active=4),
        "sixteen_top_4_router_gain": _pool(experts=16, width=23, active=4, router="layer", output_gain=True),
        "sixteen_factorised": {"model": {"embedding_factor": 32, "moe": {"experts": 16, "width": 32}}},
        "router_per_layer": _pool(router="layer"),
        "output_gain": _pool(output_gain=True),
        "init_half": _pool(init_scale=0.5),
        "init_double": _pool(init_scale=2.0),
        "pool_rate_half": {"train": {"expert_learning_rate_scale": 0.5}},
        "pool_rate_double": {"train": {"expert_learning_rate_scale": 2.0}},
        "balance_per_call": {"balance": {"loss": "per_call"}},
        "balance_none": {"balance": {"loss": "none"}},
        "balance_bias": _pool(selection_bias=True) | {"balance": {"loss": "none", "bias_rate": 0.01}},
    }
    config.variants = ml_collections.ConfigDict(changes)
    return config


def _pool(**changes) -> dict:
    return {"model": {"moe": changes}}
