"""WikiText-2, another text than the base has learned: perplexity after LoRA, SkeMA and everything.

Cost: three epochs, about half an hour a variant on one core. Expected: docs/adapters.md.
Command: ./launch/adapters.sh, or
moe-reduce adapt --config=configs/adapt_wikitext2.py --workdir=runs/adapt_wikitext2 --variant=skema_100_in_10k_1e-02
Data: ../shared/data/wikitext-2/train.txt.gz where it is there; hub:Salesforce/wikitext:wikitext-2-v1 elsewhere.
"""

import ml_collections

from configs import adapt_uuid


def get_config() -> ml_collections.ConfigDict:
    """The methods and rates of configs/adapt_uuid.py on running text."""
    config = adapt_uuid.get_config()
    config.data.update(source="../shared/data/wikitext-2/train.txt.gz", sequence_length=128, validation_fraction=0.02)
    config.train.update(
        steps=2500, batch_size=32, warmup_steps=100, evaluate_every=500, evaluate_batches=16, checkpoint_every=500
    )
    return config
