"""Training a SentencePiece vocabulary on a bounded sample of a corpus.

BPE rather than unigram: on 10 MB of textbooks and of Python a vocabulary of 4096 trains 15 times faster and gives 1 to
2 % fewer tokens. Encoding is slower, but it happens once and in parallel.
"""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from moe_reduce.core.errors import UserError
from moe_reduce.data.pieces import hash_fraction
from moe_reduce.data.sentencepiece_tokenizer import SentencePieceTokenizer

SAMPLE_CHARACTERS = 10_000_000
LINE_CHARACTERS = 4096


def sample_texts(texts: Iterable[str], characters: int = SAMPLE_CHARACTERS) -> list[str]:
    """Sample about `characters` of the texts at most, spread evenly over all of them, the same each time.

    A text is kept while a hash of its index is below a threshold, which halves whenever the sample overflows.
    """
    threshold, total = 1.0, 0
    kept: list[tuple[float, str]] = []
    for index, text in enumerate(texts):
        fraction = hash_fraction(f"sample/{index}")
        if fraction >= threshold:
            continue
        kept.append((fraction, text))
        total += len(text)
        while total > characters and len(kept) > 1:
            threshold /= 2
            kept = [entry for entry in kept if entry[0] < threshold]
            total = sum(len(entry[1]) for entry in kept)
    return [text for _, text in kept]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a lossless BPE with byte fallback (ids: 0 unknown, 1 start, 2 end of text), the same for the same texts.

    Uses about 10 MB of the texts; many short texts give a better sample than a few long ones. Raises UserError when
    they do not fill `vocab_size`.
    """
    sample = sample_texts(texts)
    if not any(text.strip() for text in sample):
        raise UserError("the corpus holds no text to train a tokenizer on: check data.source and data.text_field")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * LINE_CHARACTERS,
            num_threads=1,  # the model's bytes depend on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _too_large(vocab_size, str(error)) from error
    return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            yield from (line[start : start + LINE_CHARACTERS] for start in range(0, len(line), LINE_CHARACTERS))


def _too_large(vocab_size: int, message: str) -> UserError:
    if found := re.search(r"value <= (\d+)", message):
        return UserError(
            f"model.vocab_size={vocab_size} is more than this corpus fills: set it to at most {found[1]}, "
            "give more text, or name a trained one in data.tokenizer"
        )
    if found := re.search(r"required_chars. \d+ vs (\d+)", message):
        return UserError(
            f"model.vocab_size={vocab_size} is too small for a tokenizer trained on this corpus: set it to at least "
            f"{int(found[1]) + 1}"
        )
    return UserError(f"no tokenizer of model.vocab_size={vocab_size} can be trained on this corpus: {message}")
