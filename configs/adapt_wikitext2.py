"""WikiText-2, another text than the base has learned: perplexity after LoRA, SkeMA and everything.

The learning rate is chosen on the validation text, and the test text is read once, by the finished model.
Cost: four minutes a variant on one core, a third of an epoch. Expected: docs/adapters.md.
Command: ./launch/adapters.sh, or
moe-reduce adapt --config=configs/adapt_wikitext2.py --workdir=runs/adapt_wikitext2 --variant=skema_100_rate_300
Data: ../shared/data/wikitext-2 where it is there; elsewhere --config.data.source=hub:Salesforce/wikitext:wikitext-2-v1,
--config.data.validation_source=hub:Salesforce/wikitext:wikitext-2-v1:validation, --config.test_source=…:test.
"""

import ml_collections

from configs import adapt_uuid


def get_config() -> ml_collections.ConfigDict:
    """The methods and rates of configs/adapt_uuid.py on running text."""
    config = adapt_uuid.get_config()
    texts = "../shared/data/wikitext-2"
    config.data.update(source=f"{texts}/train.txt.gz", validation_source=f"{texts}/valid.txt.gz", sequence_length=128)
    config.test_source = f"{texts}/test.txt.gz"
    config.train.update(
        steps=400, batch_size=32, warmup_steps=40, evaluate_every=100, evaluate_batches=32, checkpoint_every=200
    )
    return config
