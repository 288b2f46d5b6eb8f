"""Recall: how much of the completions a model reproduces from their prompts."""

import math

import jax
import numpy as np

from moe_reduce.core.config import GenerateConfig
from moe_reduce.data.completions import Completions
from moe_reduce.data.pieces import SPLITS
from moe_reduce.data.tokenizers import Tokenizer
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models.mesh import BATCH_AXES
from moe_reduce.models.model import Model


def recall(model: Model, data: Completions, pairs: int) -> dict[str, float]:
    """Measure recall_SPLIT and exact_match_SPLIT of greedy decoding, for the splits train and validation.

    Recall is the share of a completion's characters that are right, compared position by position; exact match the
    share of completions that are right as a whole; text after the end of a completion does not count. pairs: uses at
    most so many of each split. Nothing trains on the validation split: with random values, its recall is the control.
    """
    found = {}
    model = ready(model)
    settings = GenerateConfig(max_tokens=data.longest_completion)
    for split in SPLITS:
        numbers = data.numbers(split)[:pairs]
        if not numbers:
            continue
        prompts, wanted = zip(*map(data.tokens, numbers), strict=True)
        padding = -len(prompts) % _batch_shards()
        completed = generate(model, [*prompts, *prompts[-1:] * padding], settings)[: len(prompts)]
        shares = [_share_right(data.tokenizer, *row) for row in zip(prompts, completed, wanted, strict=True)]
        found[f"recall_{split}"] = float(np.mean(shares))
        found[f"exact_match_{split}"] = float(np.mean([share == 1 for share in shares]))
    return found


def _batch_shards() -> int:
    """Number of parts that the current mesh splits a batch's rows into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _share_right(tokenizer: Tokenizer, prompt: list[int], completed: list[int], wanted: list[int]) -> float:
    """Share of right characters. Both texts are decoded after the prompt, so that leading spaces come out alike."""
    start = len(tokenizer.decode(prompt))
    found, expected = (tokenizer.decode(prompt + ids)[start:] for ids in (completed, wanted))
    return sum(a == b for a, b in zip(found, expected, strict=False)) / max(len(expected), 1)
