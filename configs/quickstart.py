"""A dense LLaMA and a shared MoE of under 40 % of its parameters, on the Python standard library, on a CPU.

Cost: about three minutes on 2 cores, installation included. Expected: a table and loss.png; after 0.8M tokens each the
shared MoE is about 0.17 nats behind.
Command: ./launch/quickstart.sh
"""

import ml_collections

from configs import cpu_pair


def get_config() -> ml_collections.ConfigDict:
    """Both models, for the same tokens."""
    config = cpu_pair.get_config()
    config.data.update(source="python-stdlib")
    config.train.update(steps=200, warmup_steps=50, evaluate_every=50, checkpoint_every=50, evaluate_batches=16)
    return config
