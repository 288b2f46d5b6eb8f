"""SkeMA in three sizes for any model and text: --variant=light, balanced or quality.

| variant | sketch width k | matrices, in every layer |
| --- | --- | --- |
| light | 256 | gate, up, down |
| balanced | 512 | q, k, v, gate, up, down |
| quality | 768 | q, k, v, o, gate, up, down |

Each trained core holds k x k parameters. A matrix narrower than k is refused by name: choose a smaller k with
--config.variants.light.adapter.sketch_width=128, or another variant.

Choose `model`, `data.source`, and the keys of `train` as in configs/adapt.py.
Cost: `train.steps` training steps of batch_size x sequence_length tokens, about two thirds of full training each.
Expected: an adapter and a merged model in the workdir.
Command: moe-reduce adapt --config=adapt_profiles --variant=balanced --config.model=MODEL --workdir=runs/adapt_balanced
"""

import ml_collections

from configs import adapt


def get_config() -> ml_collections.ConfigDict:
    """The recipe of configs/adapt.py with SkeMA, in three variants."""
    config = adapt.get_config()
    config.budget = None
    config.adapter.method = "skema"
    config.train.learning_rate = 1e-2
    sizes = {"light": (256, "mlp"), "balanced": (512, "q,k,v,mlp"), "quality": (768, "attention,mlp")}
    config.variants = ml_collections.ConfigDict(
        {name: {"adapter": {"sketch_width": k, "targets": targets}} for name, (k, targets) in sizes.items()}
    )
    return config
