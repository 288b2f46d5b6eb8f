"""The quick start's mixture made smaller: one pool of all experts, half of them pruned, then a short recovery.

The pool computes exactly what the mixture computed. REAP (arXiv:2510.13999) scores each expert on the training text.
The recovery trains routers, norms and experts on the same text, for a quarter of the pretraining's steps.
Cost: about a minute on 2 cores.
Expected: validation loss 2.98 (mixture and pool), 3.03 (pruned) and 2.96 (recovered). The recovered model has 63 % of
the bytes, and is a little better because it trained for longer.
Command: ./launch/quickstart.sh, or
moe-reduce reduce --config=configs/quickstart_reduce.py --workdir=runs/quickstart/reduced
"""

import ml_collections

from configs import quickstart_models
from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """Three stages on the text that the mixture was trained on."""
    trained = quickstart_models.get_config()
    config = defaults.reduce_base()
    config.model = "runs/quickstart/models/mixture/model"
    for section in ("data", "train", "execution", "balance"):
        config[section] = trained[section]
    stages = {
        "pooled": defaults.stage("pool", router="layer", canonical=False),
        "pruned": defaults.stage("prune", keep=0.5, criterion="reap_total"),
        "recovered": defaults.stage(
            "tune", components="router,norm,experts", steps=50, learning_rate=3e-3, final_learning_rate=3e-4,
            warmup_steps=5,
        ),
    }  # fmt: skip
    config.update(defaults.in_order(stages))
    return config
