"""Distillation beside fine-tuning at equal tokens: configs/small_qwen3_moe.py with a fifth of its experts, recovered.

Every variant scores and prunes the same experts of the same model, then trains routers, norms and experts on the same
text in the same order: on the next token alone (`tuned`), or mixed with the distribution of the unpruned model at a
weight and a temperature.
Cost: 15 minutes a variant on one core; `tuned` 10.
Expected: distillation recovers more than fine-tuning on as many tokens.
Command: ./launch/distillation.sh, or
moe-reduce reduce --config=configs/distillation.py --config.model=runs/small_qwen3_moe/model --workdir=runs/distillation
"""

import ml_collections

from configs import reduce_small, small_qwen3_moe
from moe_reduce.core import config as defaults

KEEP = 48.0  # of 240 experts
STEPS = 1500  # of recovery; 4,096 tokens each
LOSSES = {
    "tuned": {},
    "half": {"teacher_weight": 0.5},
    "whole": {"teacher_weight": 1.0},
    "warm": {"teacher_weight": 0.5, "teacher_temperature": 2.0},
}


def get_config() -> ml_collections.ConfigDict:
    """One variant for each loss; they share the stage that prunes."""
    variants = {name: defaults.in_order(stages(**loss)) for name, loss in LOSSES.items()}
    config = reduce_small.reducing(small_qwen3_moe.get_config(), "runs/small_qwen3_moe/model", variants)
    config.train.update(evaluate_every=250, checkpoint_every=500)
    return config


def stages(**loss) -> dict:
    """Pruning to a fifth of the experts, and recovery with a loss."""
    return {
        "prune": defaults.stage("prune", keep=KEEP, criterion="reap"),
        "recover": reduce_small.tune(STEPS, components="router,norm,experts", **loss),
    }
