"""Qwen3-30B-A3B as one global pool of 6,144 experts, pruned to half, to 1,200 and to 600 experts, on FineWeb-Edu.

For a TPU v4-32: 16 chips, weights in bf16, experts sharded over 8 devices, trained parameters in fp32. The variant
`lossless_start` computes the same as the model, without the canonical form, which would round folded weights to bf16
once more; the stage `anneal` then lets layers use experts of other layers. `random_start` begins with a new router.
Cost: 100 million tokens of a model with 3.3B active parameters, hours on a TPU v4-32. Expected: not measured.
Command: moe-reduce reduce --config=configs/qwen3_30b_a3b_global.py --config.model=DIR --workdir=runs/global
Counts of every stage, without weights: moe-reduce plan --config=configs/qwen3_30b_a3b_global.py
"""

import ml_collections

from moe_reduce.core import config as defaults

STEPS = 500  # of 64 x 2,048 tokens at each size


def get_config() -> ml_collections.ConfigDict:
    """Both starts, followed by the same stages."""
    config = defaults.reduce_base()
    config.model = "Qwen3-30B-A3B"
    config.architecture = ml_collections.ConfigDict(defaults.to_dict(architecture()))
    config.data.update(source="hub:HuggingFaceFW/fineweb-edu", sequence_length=2048, validation_fraction=0.001)
    config.data.max_documents = 400_000
    config.train.update(batch_size=64, accumulation=2, evaluate_every=100, evaluate_batches=16, checkpoint_every=100)
    config.mesh.update(
        data=-1, expert=8
    )  # the pool is nine tenths of the model: whole experts a device, and tokens travel
    config.execution.update(platform="tpu", compute_dtype="bfloat16", remat="full")
    config.balance.update(entropy_floor=0.2, dead_share_limit=0.9)
    starts = {
        "lossless_start": {
            "pool": defaults.stage("pool", canonical=False),
            "anneal": tune(2 * STEPS, bias_from=6.0),
        },
        "random_start": {
            "pool": defaults.stage("pool", canonical=False, start="random", score_function="sigmoid"),
            "distil": tune(4 * STEPS, objective="router"),
            "router": tune(2 * STEPS),
        },
    }
    config.variants = ml_collections.ConfigDict(
        {name: defaults.in_order(stages | ladder()) for name, stages in starts.items()}
    )
    return config


def architecture() -> defaults.ModelConfig:
    """The model, as its config.json describes it."""
    return defaults.ModelConfig(
        vocab_size=151_936, layers=48, width=2048, query_heads=32, key_value_heads=4, head_width=128,
        moe=defaults.MoEConfig(experts=128, active=8, width=768),
        tied_embeddings=False, qk_norm=True, rope_theta=1e6, norm_epsilon=1e-6, max_positions=40_960,
    )  # fmt: skip


def tune(steps: int, **changes) -> dict:
    """A stage that trains the router."""
    return defaults.stage("tune", steps=steps, learning_rate=1e-4, warmup_steps=steps // 10, **changes)


def ladder() -> dict:
    """Pruning to half, to 1,200 and to 600 experts, each followed by recovery."""
    stages = {}
    for name, keep in {"50_percent": 0.5, "1200": 1200.0, "600": 600.0}.items():
        stages[f"prune_{name}"] = defaults.stage("prune", keep=keep, criterion="reap_total", calibration_batches=8)
        stages[f"recover_{name}"] = tune(STEPS)
    return stages
