"""One global router over one pool of experts, as the published recipe has it, and with one part changed at a time.

`source_*` is the published design: one sigmoid router for all layers, started at random, distilled from the layers'
routers (sum of Bernoulli KL), trained on text, then pruning to 50, 20 and 10 % with router-only recovery. Each other
variant changes one or two of these parts: the start, the score function, the number of routers, the distillation, or
what recovers. All see as many tokens between the same numbers of experts, and stages of one name see the same text.
Cost: 4.1M tokens a variant, estimated at 5 to 10 minutes on one free core. Expected:
docs/results/reduce_global_router/NOTES.md.
Command: ./launch/global_router.sh, or
moe-reduce reduce --config=configs/reduce_global_router.py --config.model=runs/small_qwen3_moe/model
--workdir=runs/reduce_global
"""

from functools import partial

import ml_collections

from configs import reduce_small, small_qwen3_moe
from moe_reduce.core import config as defaults

KEPT = (120, 48, 24)  # 50, 20 and 10 % of 240 experts
START = reduce_small.ANNEALING  # steps before the first pruning, whatever the start needs
OFFSET = 8.0  # subtracted from the logits before sigmoid scores, so that the lossless start stays close
RECOVERED = {"components": "router,norm,experts", "teacher_weight": 0.5}  # what won in configs/reduce_small.py


def get_config() -> ml_collections.ConfigDict:
    """Return the source's design and its variants, all from one trained model."""
    found = {name: defaults.in_order(stages) for name, stages in variants().items()}
    config = reduce_small.reducing(small_qwen3_moe.get_config(), "runs/small_qwen3_moe/model", found)
    config.train.update(evaluate_every=100, checkpoint_every=300)
    return config


def variants() -> dict:
    """Return reductions by name, in the order in which to run them (commands list them sorted)."""
    router_only = partial(reduce_small.prunings, KEPT, "reap_total")
    experts_taught = partial(router_only, **RECOVERED)
    shared, layer = {"router": "shared"}, {"router": "layer"}
    sigmoid = {"score_function": "sigmoid"}
    return {
        # the source, then the two designs that this repository found better, with router-only recovery
        "source_random_sigmoid_shared_router": distilled(**sigmoid, **shared) | router_only(),
        "lossless_softmax_shared_router": annealed(**shared) | router_only(),
        "lossless_softmax_router_per_layer": annealed(**layer) | router_only(),
        # the same three with the recovery that won
        "source_random_sigmoid_shared_router_experts_taught": distilled(**sigmoid, **shared) | experts_taught(),
        "lossless_softmax_shared_router_experts_taught": annealed(**shared) | experts_taught(),
        "lossless_softmax_router_per_layer_experts_taught": annealed(**layer) | experts_taught(),
        # the source with one part changed
        "lossless_sigmoid_shared_router": annealed(**sigmoid, offset=OFFSET, **shared) | router_only(),
        "random_sigmoid_router_per_layer": distilled(**sigmoid, **layer) | router_only(),
        "random_softmax_shared_router": distilled(**shared) | router_only(),
        "random_sigmoid_shared_router_no_distillation": undistilled(**sigmoid, **shared) | router_only(),
    }


def pool(**changes) -> dict:
    """Merge all experts into one pool, without the canonical form."""
    return defaults.stage("pool", canonical=False, **changes)


def annealed(**changes) -> dict:
    """Start lossless, then lower the bias against other layers' experts to 0."""
    return {"pool": pool(**changes), "anneal": reduce_small.tune(START, bias_from=6.0)}


def distilled(**changes) -> dict:
    """Start at random, distil from the layers' routers, then train on text."""
    return {
        "pool": pool(start="random", **changes),
        "distil": reduce_small.tune(START // 2, objective="router"),
        "router": reduce_small.tune(START // 2),
    }


def undistilled(**changes) -> dict:
    """Start at random and train on text alone."""
    return {"pool": pool(start="random", **changes), "router": reduce_small.tune(START)}
