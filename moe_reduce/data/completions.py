"""Pairs of a prompt and a completion, one a row, with the interface of a corpus; only completions are learned.

`data.text_field` names the prompt's field and `data.completion_field` the completion's. The source `uuid-pairs:N` makes
N random keys and values, which can only be memorised.
"""

import dataclasses
import math
import random
import uuid

import numpy as np

from moe_reduce.core.data_config import UUID_PAIRS, DataConfig, content
from moe_reduce.core.errors import UserError
from moe_reduce.data import sources
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.tokenizers import Tokenizer

UUID_SEED = 0


class Completions:
    """Rows of a prompt, its completion and end of text, padded with end of text; held in memory.

    Prompt and completion are encoded as one text: encoded apart, some tokenizers put a space before the completion.
    The last `validation_fraction` of the rows are for validation. The targets that count are the completion's tokens
    and the end of text after them.
    """

    directory = None

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        """Raises UserError when fields are missing or a pair is longer than data.sequence_length."""
        if config.document_mask:
            raise UserError(
                "data.document_mask is for running text, and each completion has a row of its own: unset it"
            )
        self.end_of_text, self.tokenizer = tokenizer.end_of_text, tokenizer
        self.pairs = list(_pairs(config))
        if not self.pairs:
            raise UserError(f"data.source={config.source} holds no prompt: give another")
        encoded = [tokenizer.encode_pair(prompt, completion) for prompt, completion in self.pairs]
        self.prompt_lengths = np.array([length for _, length in encoded])
        self._ids = [[*ids, tokenizer.end_of_text] for ids, _ in encoded]
        self.longest_completion = max(len(ids) - length for ids, length in encoded)
        longest = max(range(len(self._ids)), key=lambda index: len(self._ids[index]))
        if len(self._ids[longest]) > config.sequence_length + 1:
            raise UserError(
                f"pair {longest + 1} of {config.source} has {len(self._ids[longest])} tokens: set "
                f"data.sequence_length={len(self._ids[longest]) - 1} or more"
            )
        if not all(self.prompt_lengths):
            raise UserError(_without_prompt(self.pairs, int(np.argmin(self.prompt_lengths)), config.source))
        self._training = len(self.pairs) - math.ceil(len(self.pairs) * config.validation_fraction)

    def numbers(self, split: str) -> range:
        """Indices of the pairs in a split."""
        return range(self._training) if split == TRAIN else range(self._training, len(self.pairs))

    def rows(self, split: str, sequence_length: int) -> int:
        """Number of pairs in the split."""
        del sequence_length  # checked when the pairs were read
        return len(self.numbers(split))

    def row(self, split: str, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a pair: ids, int32 [T + 1], and which of the T targets count, float32 [T]."""
        number = self.numbers(split)[index]
        ids = np.full(sequence_length + 1, self.end_of_text, np.int32)
        ids[: len(self._ids[number])] = self._ids[number]
        counts = np.zeros(sequence_length, np.float32)
        counts[self.prompt_lengths[number] - 1 : len(self._ids[number]) - 1] = 1
        return ids, counts

    def tokens(self, number: int) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids of its completion without the end of text) of the pair with this number."""
        length = int(self.prompt_lengths[number])
        return self._ids[number][:length], self._ids[number][length:-1]

    @property
    def largest_id(self) -> int:
        """Largest id of all rows."""
        return max(max(ids) for ids in self._ids)

    def describe(self, split: str) -> str:
        """Size of the split, for messages."""
        return f"{self.rows(split, 0):,} pairs"


def _without_prompt(pairs: list[tuple[str, str]], number: int, source: str) -> str:
    if not pairs[number][0]:
        return f"pair {number + 1} of {source} has an empty prompt"
    return f"pair {number + 1} of {source}: prompt and completion start with one common token: give it a longer prompt"


def _pairs(config: DataConfig) -> list[tuple[str, str]]:
    if content(config.source) == "pairs":
        return uuid_pairs(config.source.removeprefix(UUID_PAIRS))
    assert config.completion_field is not None
    plain_text = sources.text_source(config.source).plain_text()
    if plain_text is not None:
        raise UserError(f"data.completion_field is a field of rows, and {plain_text} is plain text: leave it None")
    completions = sources.documents(dataclasses.replace(config, text_field=config.completion_field))
    return list(zip(sources.documents(config), completions, strict=True))


def uuid_pairs(count: str) -> list[tuple[str, str]]:
    """Make `count` pairs of a random key, as prompt, and a random value; the same ones every time."""
    if not count.isdigit() or not int(count):
        raise UserError(f"data.source={UUID_PAIRS}{count}: give a number of pairs, such as {UUID_PAIRS}1000")
    generator = random.Random(UUID_SEED)

    def one() -> str:
        return str(uuid.UUID(int=generator.getrandbits(128), version=4))

    return [(f"{one()} -> ", one()) for _ in range(int(count))]
