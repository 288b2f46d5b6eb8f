"""Reductions of configs/medium_qwen3_moe.py to a fifth of its experts: one shared pool beside per-layer pruning.

The questions of configs/reduce_small.py at 16 times the parameters and twice the experts, on one GPU.
Cost: estimated at two to four minutes on an H100, all variants at once. Expected: not run to its end yet.
Command: ./launch/reduce_medium.sh
"""

import ml_collections

from configs import medium_qwen3_moe, reduce_small
from moe_reduce.core import config as defaults

KEPT = (384, 256, 152, 104)  # 75, 50, 30, 20 % of 512; below 64 a layer has fewer experts than the 8 active
RATES = {"learning_rate": 3e-3, "final_learning_rate": 3e-4}


def get_config() -> ml_collections.ConfigDict:
    """The pool, the criteria to compare it with, and two recoveries."""
    found = {name: defaults.in_order(stages) for name, stages in variants().items()}
    config = reduce_small.reducing(medium_qwen3_moe.get_config(), "runs/medium_qwen3_moe/model", found)
    config.execution.scan_unroll = 1  # each number of experts compiles anew, which takes most of the time
    config.train.update(evaluate_every=200, checkpoint_every=1000)
    return config


def variants() -> dict:
    """The criteria of configs/reduce_small.py without recovery, and its recoveries of norms and of experts."""
    chosen = ("layers_reap", "layers_frequency", "layers_random", "pool")
    names = [f"{name}_no_recovery" for name in chosen]
    names += [f"{scope}{rung}" for rung in ("_norms", "_experts") for scope in ("layers", "pool")]
    known = reduce_small.variants(KEPT)
    return {
        name: {key: stage | (RATES if stage["kind"] == "tune" else {}) for key, stage in known[name].items()}
        for name in names
    }
