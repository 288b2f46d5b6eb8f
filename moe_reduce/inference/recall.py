"""How much of the completions a model gives back when it is asked with their prompts."""

from typing import Any

import numpy as np

from moe_reduce.config import ExecutionConfig, GenerateConfig, ModelConfig
from moe_reduce.data.completions import Completions
from moe_reduce.data.pieces import SPLITS
from moe_reduce.inference.generate import generate, ready
from moe_reduce.storage.model import Model


def recall(
    config: ModelConfig, execution: ExecutionConfig, params: Any, data: Completions, most: int
) -> dict[str, float]:
    """{recall_train, recall_validation}: share of a completion's characters that greedy decoding gets right, in place.

    Of the first `most` pairs of each split. The validation split was never seen: random values there are the control.
    """
    found = {}
    model = ready(Model(config, params, execution))
    settings = GenerateConfig(max_tokens=data.longest_completion)
    for split in SPLITS:
        numbers = data.numbers(split)[:most]
        if not numbers:
            continue
        prompts = [data.tokenizer.encode(data.pairs[number][0]) for number in numbers]
        ids = generate(model, prompts, settings)
        wanted = [data.pairs[number][1] for number in numbers]
        texts = [data.tokenizer.decode(prompt + row) for prompt, row in zip(prompts, ids, strict=True)]
        starts = [data.tokenizer.decode(prompt) for prompt in prompts]
        given = [text.removeprefix(start) for text, start in zip(texts, starts, strict=True)]
        found[f"recall_{split}"] = float(np.mean([_right(*pair) for pair in zip(given, wanted, strict=True)]))
    return found


def _right(given: str, wanted: str) -> float:
    return sum(left == right for left, right in zip(given, wanted, strict=False)) / max(len(wanted), 1)
