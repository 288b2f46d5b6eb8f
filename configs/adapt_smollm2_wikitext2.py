"""WikiText-2 on a published model, SmolLM2-135M-Instruct: perplexity with LoRA, SkeMA and full fine-tuning.

Three epochs of the training text. Each learning rate is judged on the validation text; the test text is read once, by
the finished model. Adapters are those of configs/adapt_smollm2_uuid.py.
The base is runs/smollm2, from ./launch/smollm2.sh.
Cost: three epochs of 2.4M tokens a variant, fifteen hours on two cores, minutes on a GPU. Expected: not run
yet; ./launch/adapters.sh makes the table.
Command: TASKS=smollm2_wikitext2 ./launch/adapters.sh, or
moe-reduce adapt --config=adapt_smollm2_wikitext2 --workdir=runs/adapt_smollm2_wikitext2 --variant=skema_87_rate_300
"""

import ml_collections

from configs import adapt_smollm2_uuid
from configs.adapt_wikitext2 import WIKITEXT2


def get_config() -> ml_collections.ConfigDict:
    """The methods and rates of configs/adapt_smollm2_uuid.py on running text."""
    config = adapt_smollm2_uuid.get_config()
    config.data.update(
        source=WIKITEXT2, validation_source=f"{WIKITEXT2}:validation", sequence_length=256, validation_fraction=0.01
    )
    config.test_source = f"{WIKITEXT2}:test"
    config.train.update(
        steps=0, epochs=3.0, batch_size=16, warmup_steps=100, evaluate_every=300, evaluate_batches=32,
        checkpoint_every=300,
    )  # fmt: skip
    return config
