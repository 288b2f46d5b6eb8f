"""Adaptation to WikiText-2, a text unlike the base's: perplexity with LoRA, SkeMA and full fine-tuning.

Each learning rate is judged on the validation text; the test text is read once, by the finished model.
The base is runs/small_qwen3_moe/model, from configs/small_qwen3_moe.py.
Cost: four minutes a variant on one core, a third of an epoch. Expected: the table in docs/results/adapt_wikitext2.
Command: ./launch/adapters.sh, or
moe-reduce adapt --config=configs/adapt_wikitext2.py --workdir=runs/adapt_wikitext2 --variant=skema_100_rate_300
Another text: --config.data.source, --config.data.validation_source and --config.test_source.
"""

import ml_collections

from configs import adapt_uuid

WIKITEXT2 = "hub:Salesforce/wikitext:wikitext-2-v1"


def get_config() -> ml_collections.ConfigDict:
    """The methods and rates of configs/adapt_uuid.py on running text."""
    config = adapt_uuid.get_config()
    config.data.update(source=WIKITEXT2, validation_source=f"{WIKITEXT2}:validation", sequence_length=128)
    config.test_source = f"{WIKITEXT2}:test"
    config.train.update(
        steps=400, batch_size=32, warmup_steps=40, evaluate_every=100, evaluate_batches=32, checkpoint_every=200
    )
    return config
