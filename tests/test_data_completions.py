"""Prompts with completions: what is learned of a row, where pairs come from, and what is refused."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.completions import Completions, uuid_pairs
from moe_reduce.data.pieces import TRAIN, VALIDATION
from moe_reduce.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_reduce.data.tokenizer_training import train_tokenizer

PAIRS = [(f"what is {n} plus one? ", f"it is {n + 1}") for n in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{left}{right}" for left, right in PAIRS] * 20, 290)


def config_of(directory, **changes):
    file = directory / "pairs.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS))
    data = DataConfig(source=str(file), text_field="question", completion_field="answer", sequence_length=64)
    return dataclasses.replace(data, **{"validation_fraction": 0.25} | changes)


def test_only_completions_and_the_end_behind_them_count(tmp_path, tokenizer):
    data = Completions(config_of(tmp_path), tokenizer)
    assert (data.rows(TRAIN, 64), data.rows(VALIDATION, 64)) == (6, 2)
    for split, first in ((TRAIN, 0), (VALIDATION, 6)):
        for index in range(data.rows(split, 64)):
            text = "".join(PAIRS[first + index])
            prompt, completion = data.tokens(first + index)
            assert prompt + completion == tokenizer.encode(text)
            assert tokenizer.decode(completion).strip() == PAIRS[first + index][1]
            ids, counts = data.row(split, index, 64)
            assert ids.tolist()[: len(prompt) + len(completion)] == prompt + completion
            assert set(ids[len(prompt) + len(completion) :]) == {tokenizer.end_of_text}
            targets = ids[1:][counts > 0]
            assert targets.tolist() == [*completion, tokenizer.end_of_text]
            assert set(np.unique(counts)) <= {0.0, 1.0}


def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_before_completions(tmp_path):
    model = io.BytesIO()
    pairs = [("key -> ", "value"), ("2+2? Answer:", " 4"), ("def f(", "x): pass"), ("hello wor", "ld")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([left + right for left, right in pairs] * 30), model_writer=model, model_type="bpe",
        vocab_size=300, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(model.getvalue())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"p": p, "c": c}) + "\n" for p, c in pairs))
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), text_field="p", completion_field="c", sequence_length=32)
    data = Completions(dataclasses.replace(config, validation_fraction=0.0), tokenizer)
    for number, (prompt, completion) in enumerate(pairs):
        ids, counts = data.row(TRAIN, number, 32)
        learned = ids[1:][counts > 0].tolist()
        read = ids[: int(np.flatnonzero(counts)[0]) + 1].tolist()
        assert tokenizer.decode(read + learned[:-1]) == prompt + completion
        assert learned[-1] == tokenizer.end_of_text
        assert prompt.startswith(tokenizer.decode(read))


def test_a_prompt_that_its_completion_swallows_is_refused(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"p": "w", "c": "hat is"}\n')
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), text_field="p", completion_field="c")
    with pytest.raises(UserError, match=r"pair 1 of .* start with one common token"):
        Completions(config, tokenizer)


def test_uuid_pairs_are_the_same_each_time():
    assert uuid_pairs("3") == uuid_pairs("5")[:3]
    keys = {key for key, _ in uuid_pairs("50")}
    assert len(keys) == 50


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sequence_length": 8}, "set data.sequence_length="),
        ({"completion_field": "reply"}, "has no field 'reply'"),
        ({"document_mask": True}, "unset it"),
        ({"source": "uuid-pairs:0"}, "give a number of pairs"),
        ({"source": "python-stdlib"}, "is plain text"),
    ],
)
def test_mistakes_are_one_line(tmp_path, tokenizer, changes, part):
    with pytest.raises(UserError, match=part):
        Completions(config_of(tmp_path, **changes), tokenizer)
