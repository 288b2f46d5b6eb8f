"""A recipe for any model: train an adapter on a text, then merge it.

Keys to give: `model` (a directory of ours or of Hugging Face) and `data.source` (files, a hub name or python-stdlib).
Keys to choose:
- `adapter.method`: lora, rslora, dora or skema; `adapter.targets`: q, k, v, o, gate, up, down, attention or mlp.
- `budget`: share of the model's parameters that train; it decides the rank (LoRA) or the sketch width (SkeMA).
- `train.steps`, `train.learning_rate`: SkeMA wants about ten times LoRA's rate.
- `data.completion_field`: the field of jsonl rows that is learned, after `data.text_field`; without it all text is.
- `data.validation_source`, `test_source`: texts of their own; else a hundredth of the source validates.
Cost: `train.steps` training steps of batch_size x sequence_length tokens, about two thirds of full training each.
Expected: a lower validation loss than the model's own on `data.source`; summary.json and equivalence.json say how much,
and whether the merged model computes the same.
Command: moe-reduce adapt --config=adapt --config.model=DIR --config.data.source='text/*.txt' --workdir=runs/adapted
"""

import ml_collections

from configs import reduce
from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """LoRA on queries and values."""
    config = defaults.adapt_base()
    config.adapter.update(method="lora", targets="q,v")
    config.budget = 0.002
    config.data.update(source=reduce.SOURCE, sequence_length=512, max_documents=20_000)
    config.train.update(
        steps=500, batch_size=8, learning_rate=1e-3, final_learning_rate=0.0, warmup_steps=20, evaluate_every=100,
        evaluate_batches=16, checkpoint_every=100,
    )  # fmt: skip
    return config
