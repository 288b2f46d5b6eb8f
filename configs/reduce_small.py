"""Reductions of configs/small_qwen3_moe.py to a tenth of its experts: one shared pool beside per-layer pruning.

All variants prune to the same numbers of experts and recover on as many tokens in between; stages of the same name read
the same text. Variants differ in the criterion and in what recovers: routers; routers and norms; also an adapter on the
kept experts, merged after each stage; or the experts themselves. `_taught`: half of the loss is distillation from the
first model. For any other model: configs/reduce.py.
Cost: 8 to 15 minutes a variant with recovery on one core, one minute without.
Expected: with experts recovering, 50 % of the experts keep 90 % of the accuracy (docs/results/reduce_small).
Command: ./launch/reduce_small.sh, or
moe-reduce reduce --config=configs/reduce_small.py --config.model=runs/small_qwen3_moe/model --workdir=runs/reduce_small
"""

from functools import partial

import ml_collections

from configs import small_qwen3_moe
from moe_reduce.core import config as defaults

KEPT = (180, 120, 72, 48, 24)  # 75, 50, 30, 20, 10 % of 240; in each of 6 layers at least the 4 active
STEPS = 200  # recovery at each number of experts; 4,096 tokens a step
LONG_AT, LONG = 48, 1500  # `_long`: where pruning ends, and the steps of recovery there, a quarter of the pretraining
ANNEALING = 400  # steps until layers may use other layers' experts freely


def get_config() -> ml_collections.ConfigDict:
    """The pool, the reductions to compare it with, and the recoveries."""
    found = {name: defaults.in_order(stages) for name, stages in (variants() | long()).items()} | free()
    config = reducing(small_qwen3_moe.get_config(), "runs/small_qwen3_moe/model", found)
    config.train.update(evaluate_every=100, checkpoint_every=300)
    return config


def reducing(base: ml_collections.ConfigDict, model: str, stages: dict) -> ml_collections.ConfigDict:
    """Reductions of the model in the directory `model`, on the text that `base` trained it on."""
    config = defaults.reduce_base()
    config.model = model
    for section in ("data", "train", "execution"):
        config[section] = base[section]
    config.balance.update(loss="pooled", weight=0.01, entropy_floor=0.2)
    config.variants = ml_collections.ConfigDict(stages)
    return config


def variants(kept: tuple[int, ...] = KEPT) -> dict:
    """Stages of each variant, pruning to each of the numbers `kept` in turn."""
    ladder = partial(prunings, kept)
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
    """Two variants that stop pruning early and recover for longer."""
    return {f"{name}_long": longer(variants()[name]) for name in ("layers_experts_taught", "pool_experts_taught")}


def free() -> dict:
    """The variants of `long` with the same components trained from the first stage on, and no balancing loss."""
    found = {}
    for name, stages in long().items():
        last = stages[f"recover_{LONG_AT}_long"]
        recovering = {key: last[key] for key in ("components", "teacher_weight")}
        stages = {key: stage | recovering if stage["kind"] == "tune" else stage for key, stage in stages.items()}
        found[f"{name}_free"] = defaults.in_order(stages) | {"balance": {"loss": "none"}}
    return found


def longer(stages: dict) -> dict:
    """The stages up to LONG_AT experts, and a long recovery there."""
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
    """A stage that moves all experts into one pool, with a router for each layer."""
    return defaults.stage("pool", router="layer", canonical=False, **changes)


def tune(steps: int, **changes) -> dict:
    """A stage that trains for `steps` steps."""
    rates = {"learning_rate": 8e-3, "final_learning_rate": 8e-4, "warmup_steps": 20}
    return defaults.stage("tune", steps=steps, **(rates | changes))


def prunings(kept: tuple[int, ...], criterion: str, recover: bool = True, **changes) -> dict:
    """Pruning to each of the numbers `kept` in turn, each followed by recovery."""
    stages = {}
    for keep in kept:
        stages[f"prune_{keep}"] = defaults.stage("prune", keep=float(keep), criterion=criterion)
        if recover:
            stages[f"recover_{keep}"] = tune(STEPS, **changes)
    return stages
