"""A recipe for any mixture of experts: score its experts, prune half of them, let the rest recover.

Keys to give: `model` (a directory of ours or of Hugging Face) and `data.source` (files, a hub name or python-stdlib).
Keys to choose:
- `order`: prune,recover (each layer loses its own experts; transformers and vLLM open the result as it is), or
  pool,anneal,prune,recover (one pool of all experts, which layers learn to share; only moe_reduce opens it).
- `stages.prune.keep`: share of the experts that is kept; `stages.prune.criterion`: see `moe-reduce score --help`.
- `stages.recover.steps`, `.learning_rate` and `.components`: router,norm, or router,norm,experts for small models.
- `train.batch_size` and `data.sequence_length`: tokens a step; `mesh`, `execution.compute_dtype`: the hardware.
Cost: scoring is one forward pass over 16 batches; recovery is `stages.recover.steps` training steps of
batch_size x sequence_length tokens; `moe-reduce plan` with the same arguments counts the rest.
Expected: pruning half of the experts costs quality, and recovery wins part of it back. summary.json has loss and
accuracy after each stage; docs/results/reduce_small shows both for a small model.
Command: moe-reduce reduce --config=reduce --config.model=DIR --config.data.source='text/*.txt' --workdir=runs/reduced
"""

import ml_collections

from moe_reduce.core import config as defaults

SOURCE = "hub:HuggingFaceFW/fineweb-edu:sample-10BT"


def get_config() -> ml_collections.ConfigDict:
    """All stages; `order` says which of them run."""
    config = defaults.reduce_base()
    config.data.update(source=SOURCE, sequence_length=512, max_documents=20_000)
    config.train.update(batch_size=8, evaluate_every=100, evaluate_batches=16, checkpoint_every=100)
    rates = {"learning_rate": 1e-4, "final_learning_rate": 1e-5, "warmup_steps": 20}
    config.stages = ml_collections.ConfigDict(
        {
            "pool": defaults.stage("pool", router="layer", canonical=False),
            "anneal": defaults.stage("tune", steps=400, bias_from=6.0, **rates),
            "prune": defaults.stage("prune", keep=0.5),
            "recover": defaults.stage("tune", components="router,norm", steps=400, **rates),
        }
    )
    config.order = "prune,recover"
    return config
