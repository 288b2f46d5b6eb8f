"""Tokenizers of directories: the ids, special tokens and templates that transformers' AutoTokenizer gives."""

import itertools
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from odd_texts import odd_texts
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.data.tokenizers import load_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IM_TOKENS = {
    str(number): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
                  "special": special}
    for number, token, special in ((32000, "<|im_start|>", True), (32001, "<|im_end|>", True), (32002, "<tool>", False))
}  # fmt: skip
# file of settings, or what is done with the directory, by layout
LAYOUTS = {
    "model alone": ("llama2", {}),
    "model, Llama": ("llama2", {"tokenizer_config.json": LLAMA | {"add_bos_token": True}}),
    "model, not legacy": ("llama2", {"tokenizer_config.json": LLAMA | {"add_bos_token": True, "legacy": False}}),
    "model, added tokens": ("llama2", {"tokenizer_config.json": LLAMA | {"added_tokens_decoder": IM_TOKENS}}),
    "model, older files": (
        "llama2",
        {
            "tokenizer_config.json": LLAMA,
            "added_tokens.json": {"<|im_start|>": 32000, "<tool>": 32001},
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|im_start|>"},
        },
    ),
    "model, no prefix space": ("llama2", {"tokenizer_config.json": LLAMA | {"add_prefix_space": False}}),
    "model, other bos": ("llama2", {"tokenizer_config.json": LLAMA | {"bos_token": "</s>", "add_bos_token": True}}),
    "both files": ("llama2", {"tokenizer_config.json": LLAMA | {"added_tokens_decoder": IM_TOKENS}, "saved": {}}),
    "vocabulary and merges": ("qwen2.5", {}),
    "vocabulary, saved": ("qwen2.5", {"saved": {}}),
    "vocabulary, Qwen3": ("qwen2.5", {"config.json": {"model_type": "qwen3"}}),
    "json alone": ("gpt-neox-20b", {}),
    "json, GPT-NeoX": ("gpt-neox-20b", {"tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizerFast"}}),
    "json, prefix space": (
        "gpt-neox-20b",
        {"tokenizer_config.json": {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": True}},
    ),
    "json, split special": (
        "gpt-neox-20b",
        {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}},
    ),
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """layout(name): a directory with that layout."""

    def make(name):
        kind, files = LAYOUTS[name]
        if not (REAL / kind).exists():
            pytest.skip(f"needs the real tokenizer {REAL / kind}")
        directory = tmp_path_factory.mktemp("layout")
        for file in (REAL / kind).iterdir():
            shutil.copyfile(file, directory / file.name.replace("20B_", ""))
        if kind == "llama2":
            (directory / "config.json").write_text('{"model_type": "llama"}')
        for file, content in files.items():
            if file == "saved":
                theirs(directory).save_pretrained(directory)
            else:
                (directory / file).write_text(json.dumps(content))
        return directory

    return make


def theirs(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


QUICK = ("model, added tokens", "both files", "vocabulary and merges", "json, GPT-NeoX")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_ids_are_those_of_transformers_in_every_layout(layout, name, tmp_path):
    directory, texts = layout(name), odd_texts(7000)
    reader, tokenizer = theirs(directory), load_tokenizer(directory)
    expected = reader(texts, add_special_tokens=False).input_ids
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode_prompt(text) for text in texts[:2000]] == reader(texts[:2000]).input_ids
    assert [tokenizer.decode(ids) for ids in expected[:2000]] == reader.batch_decode(expected[:2000])
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash
    assert again.end_ids == tokenizer.end_ids
    assert again.encode_batch(texts[:500]) == expected[:500]
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts[:500]) == expected[:500]


@pytest.mark.parametrize(
    ("name", "least"), [("model, added tokens", 500), ("vocabulary and merges", 30), ("json alone", 30)]
)
def test_long_texts_are_cut_only_where_the_ids_stay(layout, name, least):
    assert cuts_checked(load_tokenizer(layout(name)), odd_texts(3000, seed=1)) > least


def cuts_checked(tokenizer, texts):
    """Cut each text at every place that the tokenizer allows, and compare with the whole; the number of cuts."""
    checked = 0
    for text in texts:
        places = [at for at in range(1, len(text)) if tokenizer.parts(text[:at], text[at:])]
        if not places:
            continue
        checked += len(places)
        parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
        found = tokenizer.encode_parts(parts, [False] + [True] * len(places))
        assert list(itertools.chain(*found)) == tokenizer.encode(text), repr(text)
    return checked


def test_trained_tokenizers_are_cut_only_where_the_ids_stay():
    texts = odd_texts(2000, seed=2)
    tokenizer = train_tokenizer([text for text in texts if text.isascii()] * 2, 500)
    assert cuts_checked(tokenizer, texts) > 300


@pytest.fixture
def byte_level(tmp_path):
    """byte_level(name, **settings): a directory with a small byte-level tokenizer.json and these settings."""

    def make(name="model", special=("<s>", "</s>"), opening=None, **settings):
        directory = tmp_path / name
        directory.mkdir()
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(["hello world, hello there"] * 9, trainer)
        made.add_special_tokens(list(special))
        if opening is not None:
            made.post_processor = processors.TemplateProcessing(
                single=f"{opening} $A", special_tokens=[(opening, made.token_to_id(opening))]
            )
        made.save(str(directory / "tokenizer.json"))
        given = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | settings
        (directory / "tokenizer_config.json").write_text(json.dumps(given))
        return directory

    return make


def test_settings_and_further_files_change_the_ids_and_the_hash(byte_level):
    found = {}
    for name, settings in {
        "plain": {}, "split": {"split_special_tokens": True}, "added": {"extra_special_tokens": ["wor"]},
        "eos": {"eos_token": "<s>"},
    }.items():  # fmt: skip
        tokenizer = load_tokenizer(byte_level(name, **settings))
        found[name] = (tokenizer.hash, tuple(tokenizer.encode("hello world</s>")))
    assert len(set(found.values())) == 3
    assert found["plain"] == found["eos"]  # documents end with </s> whatever the eos_token


def test_an_opening_token_starts_prompts_and_pairs_and_nothing_else(byte_level):
    tokenizer = load_tokenizer(byte_level(opening="<s>", bos_token="<s>"))
    begin = tokenizer.begin_of_text
    assert tokenizer.encode_prompt("hello") == [begin, *tokenizer.encode("hello")]
    ids, length = tokenizer.encode_pair("hello wor", "ld there")
    assert ids == [begin, *tokenizer.encode("hello world there")]
    assert tokenizer.decode(ids[:length]) == "<s>hello"  # " world" is one token, which the prompt does not end
    assert tokenizer.decode(ids[length:]) == " world there"


def test_texts_end_at_the_eos_token_and_documents_at_end_of_text(byte_level):
    directory = byte_level(special=("<|endoftext|>", "<|im_end|>"), eos_token="<|im_end|>")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert [tokenizer.decode([one]) for one in tokenizer.end_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.decode([tokenizer.end_of_turn]) == "<|im_end|>"
    ids = tokenizer.encode("hello<|im_end|> world<|endoftext|>")
    assert tokenizer.decode(ids) == "hello<|im_end|> world<|endoftext|>"
    assert tokenizer.decode(ids, special=False) == "hello world"


def test_truncation_and_padding_of_a_file_are_left_out(byte_level):
    directory = byte_level()
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=9)
    made.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    texts = ["hello there world" * 3, "a"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert tokenizer.encode_prompt(texts[0]) == tokenizer.encode(texts[0])


def test_a_tokenizer_is_read_as_that_of_the_model_it_was_made_for(byte_level):
    directory = byte_level()
    ids = []
    for config in ({"model_type": "llama"}, {"model_type": "moe_reduce", "tokenizer_model_type": "llama"}):
        (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        (directory / "config.json").write_text(json.dumps(config))
        ids.append(load_tokenizer(directory).encode("hello  world"))
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "cannot be read"),
        ("tokenizer_config.json", "[]", "cannot be read"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', "cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "x"}}', "cannot be read"),
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer\.json"),
        ("tokenizer.json", "[" * 100_000, r"tokenizer\.json is not a tokenizer\.json"),
        ("config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": null}', "name its eos_token"),
    ],
)
def test_damaged_directories_are_one_line(byte_level, file, content, part):
    directory = byte_level(special=("<s>",))
    (directory / file).write_text(content)
    with pytest.raises(UserError, match=part) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_configuration_of_any_size_costs_nothing(byte_level):
    directory = byte_level()
    (directory / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 1000000000}')
    assert load_tokenizer(directory).encode("hello")


def test_reading_what_was_trained_here_needs_no_transformers(tmp_path, monkeypatch):
    trained = train_tokenizer(["hello world, hello there"] * 30, 290)
    trained.save(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load_tokenizer(tmp_path).hash == trained.hash
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert load_tokenizer(tmp_path).hash == trained.hash
