"""configs/small_qwen3_moe.py as one pool, pruned step by step to a tenth of its experts, beside per-layer pruning.

Every reduction gets as many tokens between the same numbers of experts, the same text where stages have one name. What
recovers is a rung of a ladder: routers, also norms, also an adapter on the kept experts (merged behind each stage), or
the experts themselves; each on the next token alone, or half on what the first model says (`_taught`).
Cost: 8 to 15 minutes a variant with recovery on one core, one minute without. Expected: docs/reduction.md.
Command: ./launch/reduce_small.sh, or
moe-reduce reduce --config=configs/reduce_small.py --config.model=runs/small_qwen3_moe/model --workdir=runs/reduce_small
"""

from functools import partial

import ml_collections

from configs import small_qwen3_moe
from moe_reduce.core import config as defaults

KEPT = (180, 120, 72, 48, 24)  # 75, 50, 30, 20, 10 % of 240; in each of 6 layers never fewer than the 4 active
STEPS = 200  # of recovery at each number; 4,096 tokens a step
LONG_AT, LONG = 48, 1500  # `_long`: where pruning ends, and the steps of recovery there, a quarter of the pretraining
ANNEALING = 400  # steps in which other layers' experts enter the competition


def get_config() -> ml_collections.ConfigDict:
    """The pool, what it is compared with, and the recoveries."""
    found = {name: defaults.in_order(stages) for name, stages in (variants() | long()).items()} | free()
    config = reducing(small_qwen3_moe.get_config(), "runs/small_qwen3_moe/model", found)
    config.train.update(evaluate_every=100, checkpoint_every=300)
    return config


def reducing(base: ml_collections.ConfigDict, model: str, stages: dict) -> ml_collections.ConfigDict:
    """Reductions of a model, in this directory, that was trained as `base` says, on the same text."""
    config = defaults.reduce_base()
    config.model = model
    for section in ("data", "train", "execution"):
        config[section] = base[section]
    config.balance.update(loss="pooled", weight=0.01, entropy_floor=0.2)
    config.variants = ml_collections.ConfigDict(stages)
    return config


def variants(kept: tuple[int, ...] = KEPT) -> dict:
    """Reductions by name, each through these numbers of experts."""
    ladder = partial(_ladder, kept)
    annealed = {"pool": pool(), "anneal": tune(ANNEALING, bias_from=6.0)}
    found = {
        "pool": annealed | ladder("reap_total"),
        "pool_no_recovery": {"pool": pool()} | ladder("reap_total", recover=False),
        "pool_random_start": {
            "pool": pool(start="random", score_function="sigmoid"),
            "distil": tune(ANNEALING // 2, objective="router"),
            "router": tune(ANNEALING // 2),
        }
        | ladder("reap_total"),
    }
    for criterion in ("reap", "frequency", "random"):
        found[f"layers_{criterion}_no_recovery"] = ladder(criterion, recover=False)
        found[f"layers_{criterion}"] = {"router": tune(ANNEALING)} | ladder(criterion)
    for rung, changes in RUNGS.items():
        for suffix, loss in {"": {}, "_taught": {"teacher_weight": 0.5}}.items():
            if rung or suffix:
                found[f"layers{rung}{suffix}"] = {"router": tune(ANNEALING)} | ladder("reap", **changes, **loss)
                found[f"pool{rung}{suffix}"] = annealed | ladder("reap_total", **changes, **loss)
    gains = "router,norm,output_gain"
    canonical = {"pool": pool() | {"canonical": True}, "anneal": tune(ANNEALING, bias_from=6.0, components=gains)}
    taught = {"components": f"{gains},experts", "teacher_weight": 0.5}
    found["pool_gains_experts_taught"] = canonical | ladder("reap_total", **taught)
    return found


def long() -> dict:
    """Two with a long recovery where pruning ends."""
    return {f"{name}_long": longer(variants()[name]) for name in ("layers_experts_taught", "pool_experts_taught")}


def free() -> dict:
    """The longest recoveries once more: all that recovers trains from the first stage on, and nothing balances it."""
    found = {}
    for name, stages in long().items():
        last = stages[f"recover_{LONG_AT}_long"]
        recovering = {key: last[key] for key in ("components", "teacher_weight")}
        stages = {key: stage | recovering if stage["kind"] == "tune" else stage for key, stage in stages.items()}
        found[f"{name}_free"] = defaults.in_order(stages) | {"balance": {"loss": "none"}}
    return found


def longer(stages: dict) -> dict:
    """The stages until LONG_AT experts are left, and a long recovery there."""
    names = list(stages)
    last = names.index(f"recover_{LONG_AT}")
    begun = {name: stages[name] for name in names[:last]}
    return begun | {f"recover_{LONG_AT}_long": stages[names[last]] | {"steps": LONG}}


RUNGS = {
    "": {},
    "_norms": {"components": "router,norm"},
    "_lora": {"components": "router,norm", "adapter": defaults.AdapterConfig(targets="mlp", rank=2)},
    "_skema": {
        "components": "router,norm",
        "adapter": defaults.AdapterConfig(method="skema", targets="mlp", sketch_width=14),
    },
    "_experts": {"components": "router,norm,experts"},
}


def pool(**changes) -> dict:
    """All experts into one pool, a router in each layer."""
    return defaults.stage("pool", router="layer", canonical=False, **changes)


def tune(steps: int, **changes) -> dict:
    """Training for so many steps."""
    rates = {"learning_rate": 8e-3, "final_learning_rate": 8e-4, "warmup_steps": 20}
    return defaults.stage("tune", steps=steps, **(rates | changes))


def _ladder(kept: tuple[int, ...], criterion: str, recover: bool = True, **changes) -> dict:
    """Pruned to each number in turn, recovering in between."""
    stages = {}
    for keep in kept:
        stages[f"prune_{keep}"] = defaults.stage("prune", keep=float(keep), criterion=criterion)
        if recover:
            stages[f"recover_{keep}"] = tune(STEPS, **changes)
    return stages
