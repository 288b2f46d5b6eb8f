"""Distillation beside fine-tuning at equal tokens: configs/small_qwen3_moe.py with a fifth of its experts, in int4.

Every variant scores and prunes the same experts of the same model, then trains routers, norms and experts on the same
text in the same order: on the next token alone (`tuned`), or mixed with the distribution of the unpruned model. Then it
rounds all matrices but the routers to int4, except where they were rounded while they trained (`_int4`, `_ternary`).
`unrecovered` is pruned and rounded only.
Cost: two minutes a variant on one core.
Expected: the table in docs/results/distillation.
Command: ./launch/distillation.sh, or
moe-reduce reduce --config=configs/distillation.py --config.model=runs/small_qwen3_moe/model --workdir=runs/distillation
"""

import ml_collections

from configs import reduce_small, small_qwen3_moe
from moe_reduce.core import config as defaults

KEEP = 48.0  # of 240 experts
STEPS = 120  # of recovery; 4,096 tokens each
LOSSES = {
    "tuned": {},
    "half": {"teacher_weight": 0.5},
}
ROUNDED = {  # while they train
    "tuned_int4": LOSSES["tuned"] | {"qat": "int4"},
    "half_int4": LOSSES["half"] | {"qat": "int4"},
    "half_ternary": LOSSES["half"] | {"qat": "ternary"},
}


def get_config() -> ml_collections.ConfigDict:
    """One variant for each loss; they share the stage that prunes."""
    chains = {"unrecovered": pruned() | rounded("int4")}
    chains |= {name: pruned() | recovered(**loss) | rounded("int4") for name, loss in LOSSES.items()}
    chains |= {name: pruned() | recovered(**loss) for name, loss in ROUNDED.items()}
    chains["half_rounded_to_ternary"] = pruned() | recovered(**LOSSES["half"]) | rounded("ternary")
    variants = {name: defaults.in_order(stages) for name, stages in chains.items()}
    config = reduce_small.reducing(small_qwen3_moe.get_config(), "runs/small_qwen3_moe/model", variants)
    config.train.update(evaluate_every=120, checkpoint_every=120)
    return config


def pruned() -> dict:
    """Pruning to a fifth of the experts."""
    return {"prune": defaults.stage("prune", keep=KEEP, criterion="reap")}


def recovered(**settings) -> dict:
    """Recovery with a loss, and possibly rounding."""
    return {"recover": reduce_small.tune(STEPS, components="router,norm,experts", **settings)}


def rounded(scheme: str) -> dict:
    """Rounding of all matrices but the routers to nearest."""
    return {"round": defaults.stage("quantize", scheme=scheme)}
