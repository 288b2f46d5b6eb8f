"""Tokenizers: trained here, and real ones from disk; lossless, deterministic, and what transformers reads back."""

import io
from pathlib import Path

import pytest
import sentencepiece

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data import sources
from moe_reduce.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_reduce.data.tokenizer_training import sample_texts, train_tokenizer
from moe_reduce.data.tokenizers import load_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
ODD = "a\tb\n\n\n  c   d\r\n\u00a0é漢字🙂 ▁ ▁▁x\x0b\x00y 12345 <s> </s> <0x41>  \n "
VOCABULARY = 600


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"needs the real tokenizer {REAL / name}")
    return REAL / name


def standard_library(count):
    return list(sources.documents(DataConfig(max_documents=count)))


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(standard_library(12), VOCABULARY)


def test_trained_vocabulary_is_exact_and_lossless(trained):
    assert trained.vocab_size == VOCABULARY
    for text in [ODD, *standard_library(30)]:
        assert trained.decode(trained.encode(text)) == text
    ids = trained.encode(standard_library(1)[0])
    assert trained.end_of_text not in ids
    assert len(ids) < 0.6 * len(standard_library(1)[0])
    assert trained.end_of_text not in trained.encode("</s>")


def test_encoding_word_by_word_is_what_sentencepiece_does(trained, tmp_path):
    trained.save(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [ODD.replace("▁", ""), "  ", " a", "word" * 50 + "   " + "漢" * 100, *standard_library(30)]:
        assert trained.encode(text) == trained.encode(text) == processor.encode(text)


@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": False}, {"model_type": "unigram"}])
def test_given_models_that_change_spaces_are_followed(settings):
    model = io.BytesIO()
    lines = iter("".join(standard_library(4)).splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=360, minloglevel=2, **{"model_type": "bpe"} | settings
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = SentencePieceTokenizer(model.getvalue())
    text = "  two  spaces \n" + standard_library(1)[0]
    assert tokenizer.encode(text) == processor.encode(text)


def test_training_is_deterministic_and_follows_the_text(trained):
    assert train_tokenizer(standard_library(12), VOCABULARY).hash == trained.hash
    assert train_tokenizer(standard_library(8), VOCABULARY).hash != trained.hash


def test_the_sample_is_bounded_spread_and_the_same_each_time():
    texts = [f"{number:05d}" * 20 for number in range(10_000)]
    sample = sample_texts(texts, 100_000)
    assert sample == sample_texts(texts, 100_000)
    assert 40_000 < sum(map(len, sample)) <= 100_000
    assert int(sample[0][:5]) < 500
    assert int(sample[-1][:5]) > 9500


def test_too_large_and_too_small_vocabularies_name_the_limit():
    with pytest.raises(UserError, match=r"model.vocab_size=9000 is more than .* at most \d+"):
        train_tokenizer(["hello world\n"] * 100, 9000)
    with pytest.raises(UserError, match=r"model.vocab_size=100 is too small .* at least 2\d\d"):
        train_tokenizer(["hello world\n"] * 100, 100)
    with pytest.raises(UserError, match="holds no text"):
        train_tokenizer([" \n"], 300)


def test_saved_tokenizer_is_the_same_here_and_in_transformers(trained, tmp_path):
    trained.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == trained.hash
    text = ODD.replace("▁", "").replace("<s> </s>", "") + standard_library(1)[0]
    assert _in_transformers(tmp_path, text) == trained.encode(text)


@pytest.mark.parametrize(
    ("name", "vocab_size", "end_of_text"),
    [
        ("llama2/tokenizer.model", 32_000, "</s>"),
        ("gpt-neox-20b/20B_tokenizer.json", 50_277, "<|endoftext|>"),
        ("qwen2.5", 151_669, "<|endoftext|>"),
    ],
)
def test_real_tokenizers_agree_with_transformers(name, vocab_size, end_of_text, tmp_path):
    tokenizer = load_tokenizer(real(name))
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode([tokenizer.end_of_text]) in (end_of_text, "")  # SentencePiece prints no control piece
    text = "x  y\n" + standard_library(1)[0]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).hash == tokenizer.hash
    assert _in_transformers(tmp_path, text) == ids


def test_real_gpt_neox_ids_are_the_published_ones():
    tokenizer = load_tokenizer(real("gpt-neox-20b/20B_tokenizer.json"))
    assert tokenizer.encode("Hello, world!<|endoftext|>") == [12092, 13, 1533, 2, 0]


def test_real_qwen_ids_are_the_published_ones():
    tokenizer = load_tokenizer(real("qwen2.5"))
    assert tokenizer.encode("Hello, world! 2024<|im_end|>") == [9707, 11, 1879, 0, 220, 17, 15, 17, 19, 151645]


def _in_transformers(directory, text):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory).encode(text, add_special_tokens=False)


def test_absent_and_damaged_tokenizers_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="absent' does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_other_byte_level_families_without_a_json_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_signs_of_spaces_in_a_text_come_back(prefix):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, hello there"] * 50), model_writer=model, model_type="bpe", vocab_size=290,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=prefix, minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(model.getvalue())
    for text in ("▁", "hello▁world", "a▁▁ b", "▁ hello ▁there▁", "hello \ue000▁world"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        for end in range(1, len(text)):
            ids, length = tokenizer.encode_pair(text[:end], text[end:])
            assert ids == tokenizer.encode(text)
            assert length <= end + 9


def test_a_pair_is_one_text_divided_at_its_tokens(trained):
    for prompt, completion in (("def f(", "x): pass"), ("key -> ", "value"), ("retu", "rn x"), ("漢字🙂", "漢")):
        ids, length = trained.encode_pair(prompt, completion)
        assert ids == trained.encode(prompt + completion)
        assert prompt.startswith(trained.decode(ids[:length]))
        assert len(trained.decode(ids[: length + 1]).rstrip("\ufffd")) >= len(trained.decode(ids[:length]))
        assert trained.decode(ids) == prompt + completion
