"""How much of the completions a model gives back when it is asked with their prompts."""

import math
from typing import Any

import jax
import numpy as np

from moe_reduce.core.config import ExecutionConfig, GenerateConfig, ModelConfig
from moe_reduce.data.completions import Completions
from moe_reduce.data.pieces import SPLITS
from moe_reduce.data.tokenizers import Tokenizer
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models.mesh import BATCH_AXES
from moe_reduce.models.model import Model


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
        wanted = [data.tokenizer.encode(data.pairs[number][1]) for number in numbers]
        spare = -len(prompts) % _batch_shards()
        given = generate(model, prompts + prompts[-1:] * spare, settings)[: len(prompts)]
        shares = [_right(data.tokenizer, *one) for one in zip(prompts, given, wanted, strict=True)]
        found[f"recall_{split}"] = float(np.mean(shares))
    return found


def _batch_shards() -> int:
    """Of which a batch must have a multiple of rows, on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _right(tokenizer: Tokenizer, prompt: list[int], given: list[int], wanted: list[int]) -> float:
    """Share of the wanted characters, in place. Both are decoded behind the prompt, where spaces come out alike."""
    start = len(tokenizer.decode(prompt))
    left, right = (tokenizer.decode(prompt + ids)[start:] for ids in (given, wanted))
    return sum(a == b for a, b in zip(left, right, strict=False)) / max(len(right), 1)
