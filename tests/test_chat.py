"""Chat templates of others: what they may take, and that exceeding it is one line."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models

from moe_reduce.core.errors import UserError
from moe_reduce.inference import template_process
from moe_reduce.inference.chat import chat_prompt, chat_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = "{{ bos_token }}|{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def directory(tmp_path):
    """directory(template, **settings): a tokenizer's directory with this chat template."""

    def make(template, **settings):
        vocabulary = {token: number for number, token in enumerate([*"ehlo|", "<s>", "</s>"])}
        made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="</s>"))
        made.decoder = decoders.Fuse()
        made.add_special_tokens(["<s>", "</s>"])
        made.save(str(tmp_path / "tokenizer.json"))
        given = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template} | settings
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
        return tmp_path

    return make


def objects(names):
    return {name: {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
            for name, token in names.items()}  # fmt: skip


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("settings", "token_map"),
    [
        (NAMES, None),
        ({}, NAMES),
        ({}, objects(NAMES)),
        ({"bos_token": "h", "eos_token": "o"}, NAMES),
        ({"bos_token": "<s>"}, {"eos_token": "</s>"}),
        ({}, None),
        ({"bos_token": None, "eos_token": "</s>"}, None),
    ],
)
def test_special_tokens_come_from_the_files_that_transformers_reads(directory, settings, token_map):
    place = directory(TEMPLATE, **settings)
    if token_map is not None:
        (place / "special_tokens_map.json").write_text(json.dumps(token_map))
    reader = transformers.AutoTokenizer.from_pretrained(place)
    expected = reader.apply_chat_template(MESSAGES, tokenize=False)
    assert chat_prompt(place, "hello") == expected
    ids = reader.apply_chat_template(MESSAGES)["input_ids"]
    assert chat_tokenizer(place).encode(expected) == ids


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (ENDLESS, "more than 2 seconds"),
        ("{{ 'a' * 2000000 }}", "more than 1,048,576 characters"),
        ("{% set x = 'a' * 4000000000 %}", "MiB of memory"),
        (
            "{% set x = namespace(a='a') %}{% for i in range(40) %}{% set x.a = x.a + x.a %}{% endfor %}",
            "MiB of memory",
        ),
        ("{{ raise_exception('no\\nsuch ' + 'role' * 999) }}", "no such role"),
        ("{% for %}", "chat template of"),
        ("{{ messages[7]['content'] }}", "chat template of"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template of"),
    ],
)
def test_a_template_that_fails_or_takes_too_much_is_one_line(directory, monkeypatch, template, part):
    monkeypatch.setattr(template_process, "SECONDS", 2.0)
    place = directory(template, **NAMES)
    with pytest.raises(UserError, match=part) as caught:
        chat_prompt(place, "hello")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
