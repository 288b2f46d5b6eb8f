"""LoRA over SmolLM2-135M-Instruct in fp32, beside LoRA over the same model in NF4 and int4 (QLoRA, arXiv:2305.14314).

Rank 8 on all matrices of all layers. Every run reads the same sequences of WikiText-2 in the same order.
The bases are runs/smollm2, from ./launch/smollm2.sh, and runs/qlora/NAME, which ./launch/qlora.sh makes from it.
Cost: four minutes a base on two cores, estimated. Expected: unknown, it has not been run.
Command: ./launch/qlora.sh, or
moe-reduce adapt --config=qlora_smollm2 --config.model=runs/qlora/nf4 --workdir=runs/qlora/runs/nf4
"""

import ml_collections

from configs.adapt_wikitext2 import WIKITEXT2
from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """LoRA on running text; --config.model names the base."""
    config = defaults.adapt_base()
    config.model = "runs/smollm2"
    config.adapter.update(method="lora", targets="attention,mlp", rank=8)
    config.data.update(source=WIKITEXT2, validation_source=f"{WIKITEXT2}:validation", sequence_length=128)
    config.train.update(
        steps=20, batch_size=4, learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=2, evaluate_every=20,
        evaluate_batches=8, checkpoint_every=20,
    )  # fmt: skip
    return config
