"""One protocol for tokenizers: SentencePiece models (given, or trained here) and tokenizer.json files.

Tokenizing processes import this module: keep it free of JAX.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from moe_reduce.core import disk
from moe_reduce.core.errors import UserError
from moe_reduce.data import byte_level
from moe_reduce.data.sentencepiece_json import META_SPACE, PROBE, begins_with_space, to_json_tokenizer

SENTENCEPIECE_FILE, JSON_FILE, SETTINGS_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
BEGIN_KEY = "add_bos_token"
WORD = re.compile(" *[^ ]+| +")
CACHED_WORDS, CACHED_LENGTH = 1 << 17, 32  # tens of MB in all
# the token that separates documents is the first of these in the vocabulary, else the file's own eos_token
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """Conversion of text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id that follows each document."""
        ...

    @property
    def begin_of_text(self) -> int | None:
        """Id that may start a text; None if the vocabulary has none."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encode the text alone, with no token added before or after it."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the start of a text, with the tokens that transformers puts before it, such as beginning-of-text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, as `encode` does."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, special tokens included."""
        ...

    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer` and transformers' AutoTokenizer read."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model; text that looks like a control token (`</s>`) is encoded as text."""

    def __init__(self, model: bytes, settings: dict[str, Any] | None = None, origin: str = SENTENCEPIECE_FILE):
        """model: the bytes of a tokenizer.model. Raises UserError, naming `origin`, when they are not one."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{origin} is not a SentencePiece model: is it cut short, or a Git LFS pointer?") from error
        if self._processor.eos_id() < 0:
            raise UserError(f"{origin} has no end-of-text piece (eos_id): train it with one")
        self._model = model
        self._settings = settings
        self._meta_space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]
        self._falls_back = self._processor.unk_id() not in self._meta_space
        self._by_word = _words_are_independent(self._processor)
        self._cached = functools.lru_cache(CACHED_WORDS)(self._processor.encode)
        self.vocab_size: int = self._processor.get_piece_size()
        self.end_of_text: int = self._processor.eos_id()
        self.begin_of_text: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.hash = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        if META_SPACE not in text or not self._falls_back:
            return self._encode(text)
        # SentencePiece would turn this character into a space, so it is encoded by its bytes
        first, *rest = [self._encode(part) for part in text.split(META_SPACE)]
        return first + list(itertools.chain.from_iterable(self._meta_space + part for part in rest))

    def encode_prompt(self, text: str) -> list[int]:
        wanted = self._settings is not None and BEGIN_KEY in self._settings and self._settings[BEGIN_KEY]
        begins = wanted and self._processor.bos_id() >= 0
        return [self._processor.bos_id(), *self.encode(text)] if begins else self.encode(text)

    def _encode(self, text: str) -> list[int]:
        if not self._by_word:
            return self._processor.encode(text)
        # no piece spans two words, so words can be encoded one by one; a cache of frequent words makes it twice as fast
        words = WORD.findall(text)
        found = (self._cached(word) if len(word) <= CACHED_LENGTH else self._processor.encode(word) for word in words)
        return list(itertools.chain.from_iterable(found))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(identity) for identity in ids])

    def save(self, directory: Path) -> None:
        (directory / SENTENCEPIECE_FILE).write_bytes(self._model)
        converted = to_json_tokenizer(self._processor)
        if converted is not None:
            converted.save(str(directory / JSON_FILE))
        _write_settings(directory, self._settings or self._transformers_settings(converted is not None))

    def _transformers_settings(self, has_json: bool) -> dict[str, Any]:
        processor = self._processor
        names = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast" if has_json else "LlamaTokenizer"}
        settings |= {"add_prefix_space": begins_with_space(processor), "add_bos_token": False, "legacy": False}
        return settings | {name: processor.id_to_piece(piece) for name, piece in names.items() if piece >= 0}


def _words_are_independent(processor: sentencepiece.SentencePieceProcessor) -> bool:
    pieces = (processor.id_to_piece(identity) for identity in range(processor.get_piece_size()))
    if not all(re.fullmatch(f"{META_SPACE}*[^{META_SPACE}]*", piece) for piece in pieces):
        return False
    # a model that adds or removes spaces would do so for each word
    return list(itertools.chain.from_iterable(map(processor.encode, WORD.findall(PROBE)))) == processor.encode(PROBE)


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library; special tokens spelled out in a text are encoded as special tokens."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any] | None = None, origin: str = JSON_FILE
    ):
        """Raises UserError, naming `origin`, when the vocabulary has no token that separates documents."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._settings = settings
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.end_of_text: int = vocabulary[_end_of_text_name(vocabulary, settings, origin)]
        begins = _named(settings, "bos_token")
        self.begin_of_text: int | None = None if begins is None else vocabulary.get(begins)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.hash = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(identity) for identity in ids], skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        self._tokenizer.save(str(directory / JSON_FILE))
        end_of_text = self._tokenizer.id_to_token(self.end_of_text)
        written = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text}
        _write_settings(directory, self._settings or written)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from a .model or .json file, or from a directory.

    A directory holds tokenizer.model, tokenizer.json, or Qwen's vocab.json and merges.txt.
    Raises UserError when there is no tokenizer or it is damaged.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_directory(path)
    if not path.is_file():
        raise UserError(
            f"tokenizer {str(path)!r} does not exist: give a {SENTENCEPIECE_FILE}, a {JSON_FILE} or `train`"
        )
    settings = _read_settings(path.parent)
    if path.suffix == ".json":
        return JsonTokenizer(_read_json_tokenizer(path), settings, str(path))
    return SentencePieceTokenizer(path.read_bytes(), settings, str(path))


def _load_directory(directory: Path) -> Tokenizer:
    settings = _read_settings(directory)
    found = [
        load_tokenizer(directory / name) for name in (SENTENCEPIECE_FILE, JSON_FILE) if (directory / name).is_file()
    ]
    if found:  # of two, the larger, which has added tokens; if equal, the SentencePiece model, which loses less text
        return max(found, key=lambda tokenizer: tokenizer.vocab_size)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return JsonTokenizer(byte_level.from_vocabulary(directory, settings or {}), settings, str(directory))
    raise UserError(
        f"{directory} holds no {JSON_FILE}, {SENTENCEPIECE_FILE}, or vocab.json with merges.txt: name another tokenizer"
    )


def _read_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json ({error}): is it cut short, or a Git LFS pointer?") from error


def _read_settings(directory: Path) -> dict[str, Any] | None:
    path = directory / SETTINGS_FILE
    return disk.read_json(path) if path.is_file() else None


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    (directory / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _named(settings: dict[str, Any] | None, key: str) -> str | None:
    found = settings[key] if settings and key in settings else None
    # older files hold an AddedToken as a dict
    names = [found, found["content"] if isinstance(found, dict) and "content" in found else None]
    return next((name for name in names if isinstance(name, str)), None)


def _end_of_text_name(vocabulary: dict[str, int], settings: dict[str, Any] | None, origin: str) -> str:
    for name in (*END_OF_TEXT_NAMES, str(_named(settings, "eos_token"))):
        if name in vocabulary:
            return name
    raise UserError(f"{origin} has none of {', '.join(END_OF_TEXT_NAMES)}: name its eos_token in {SETTINGS_FILE}")
