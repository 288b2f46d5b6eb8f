"""SentencePiece models: those that are trained here, and a tokenizer.model on its own.

Tokenizing processes import this module: keep it free of JAX.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from moe_reduce.core import disk
from moe_reduce.core.errors import UserError
from moe_reduce.data.sentencepiece_json import PROBE, begins_with_space, to_json_tokenizer
from moe_reduce.data.splitting import META_SPACE, prompt_tokens
from moe_reduce.data.tokenizer_files import EXTRA_FILES, JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE

WORD = re.compile(" *[^ ]+| +")
CACHED_WORDS, CACHED_LENGTH = 1 << 17, 32  # tens of MB in all
STAND_INS = [chr(code) for code in range(0xE000, 0xE100)]  # private use: letters of no language


class SentencePieceTokenizer:
    """A SentencePiece model; text that looks like a control token (`</s>`) is encoded as text."""

    def __init__(self, model: bytes, origin: str = SENTENCEPIECE_FILE):
        """model: the bytes of a tokenizer.model. Raises UserError, naming `origin`, when they are not one."""
        self._model, self._processor = model, _processor(model, origin)
        self._meta_space = self._bytes_of(META_SPACE)
        self._by_word = _words_are_independent(self._processor)
        self._newline = _newline_ids(self._processor)
        self._cached = functools.lru_cache(CACHED_WORDS)(self._processor.encode)
        self.vocab_size: int = self._processor.get_piece_size()
        self.base_size: int = self.vocab_size
        self.end_of_text: int = self._processor.eos_id()
        self.begin_of_text: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.end_of_turn: int = self.end_of_text
        self.end_ids: tuple[int, ...] = (self.end_of_text,)
        self.hash = hashlib.sha256(b"sentencepiece\0" + model).hexdigest()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        kept = self._without_meta_space(text)
        return self._encode(text) if kept is None else self._with_meta_space(self._encode(kept[0]), kept[1])

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)  # a model without further files names no token to put before a text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        text = prompt + completion
        kept = self._without_meta_space(text)
        found: Any = self._processor.encode_as_offset_mapping(text if kept is None else kept[0])
        ids = found["ids"] if kept is None else self._with_meta_space(found["ids"], kept[1])
        return ids, prompt_tokens(found["offsets"], len(prompt))

    def parts(self, left: str, right: str) -> bool:
        if self._newline is not None and left.endswith("\n"):
            return True
        return self._by_word and right.startswith(" ") and not left.endswith(" ")

    def encode_parts(self, texts: Sequence[str], continued: Sequence[bool]) -> list[list[int]]:
        if self._by_word or self._newline is None:  # nothing is put before a text
            return self.encode_batch(texts)
        lead = len(self._newline)
        return [
            self.encode(f"\n{text}")[lead:] if follows else self.encode(text)
            for text, follows in zip(texts, continued, strict=True)
        ]

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        # the library has no text for control tokens, and one for the unknown token
        return self._processor.decode([int(one) for one in ids if special or one != self._unknown])

    def save(self, directory: Path) -> None:
        (directory / SENTENCEPIECE_FILE).write_bytes(self._model)
        converted = to_json_tokenizer(self._processor)
        if converted is not None:
            converted.save(str(directory / JSON_FILE))
        settings = json.dumps(self.settings(converted is not None), indent=2, ensure_ascii=False)
        (directory / SETTINGS_FILE).write_text(settings, encoding="utf-8")

    def settings(self, has_json: bool) -> dict[str, Any]:
        """Content of the tokenizer_config.json that `save` writes. has_json: a tokenizer.json lies beside it."""
        processor = self._processor
        names = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast" if has_json else "LlamaTokenizer"}
        settings |= {"add_prefix_space": begins_with_space(processor), "add_bos_token": False, "legacy": False}
        return settings | {name: processor.id_to_piece(piece) for name, piece in names.items() if piece >= 0}

    def _encode(self, text: str) -> list[int]:
        if not self._by_word:
            return self._processor.encode(text)
        # no piece spans two words, so words can be encoded one by one; a cache of frequent words makes it twice as fast
        words = WORD.findall(text)
        found = (self._cached(word) if len(word) <= CACHED_LENGTH else self._processor.encode(word) for word in words)
        return list(itertools.chain.from_iterable(found))

    def _without_meta_space(self, text: str) -> tuple[str, list[int]] | None:
        """(the text with ▁ replaced by a character that the vocabulary lacks, that character's ids); None without ▁.

        SentencePiece would turn ▁ into a space.
        """
        if META_SPACE not in text or self._meta_space is None:
            return None
        for character in STAND_INS:
            ids = self._bytes_of(character)
            if ids is not None and character not in text and self._processor.piece_to_id(character) == self._unknown:
                return text.replace(META_SPACE, character), ids
        return None

    def _with_meta_space(self, ids: list[int], stand_in: list[int]) -> list[int]:
        assert self._meta_space is not None
        found, start, length = list(ids), 0, len(stand_in)
        while start < len(found):
            if found[start : start + length] == stand_in:
                found[start : start + length] = self._meta_space
                start += length
            else:
                start += 1
        return found

    @property
    def _unknown(self) -> int:
        return self._processor.unk_id()

    def _bytes_of(self, character: str) -> list[int] | None:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        return None if self._processor.unk_id() in ids else ids


def _processor(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"{origin} is not a SentencePiece model: is it cut short, or a Git LFS pointer?") from error
    if processor.eos_id() < 0:
        raise UserError(f"{origin} has no end-of-text piece (eos_id): train it with one")
    return processor


def _words_are_independent(processor: sentencepiece.SentencePieceProcessor) -> bool:
    pieces = (processor.id_to_piece(identity) for identity in range(processor.get_piece_size()))
    if not all(re.fullmatch(f"{META_SPACE}*[^{META_SPACE}]*", piece) for piece in pieces):
        return False
    # a model that adds or removes spaces would do so for each word
    return list(itertools.chain.from_iterable(map(processor.encode, WORD.findall(PROBE)))) == processor.encode(PROBE)


def _newline_ids(processor: sentencepiece.SentencePieceProcessor) -> list[int] | None:
    """Ids of a newline at the start of a text, if no piece joins a newline with other text; else None.

    Texts can then be cut after a newline, and the second part encoded behind a newline of its own, whose ids are
    dropped with those of a space that the model puts before each text.
    """
    pieces = (processor.id_to_piece(identity) for identity in range(processor.get_piece_size()))
    newline, lines = processor.encode("\n"), PROBE.splitlines(keepends=True)
    behind = [processor.encode(f"\n{line}") for line in lines]
    if any("\n" in piece and piece != "\n" for piece in pieces) or any(
        ids[: len(newline)] != newline for ids in behind
    ):
        return None
    rest = itertools.chain.from_iterable(ids[len(newline) :] for ids in behind[1:])
    return newline if [*processor.encode(lines[0]), *rest] == processor.encode(PROBE) else None


def trained_here(directory: Path) -> SentencePieceTokenizer | None:
    """Load the tokenizer of a directory that `SentencePieceTokenizer.save` wrote; None for any other directory.

    Any other setting, and any further token, is for transformers to read. A chat template does not matter here.
    """
    file = directory / SENTENCEPIECE_FILE
    if not file.is_file() or any((directory / name).exists() for name in EXTRA_FILES):
        return None
    path = directory / SETTINGS_FILE
    found = disk.read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or "legacy" not in found or "add_prefix_space" not in found:
        return None
    settings = {key: value for key, value in found.items() if key != "chat_template"}
    has_json = (directory / JSON_FILE).is_file()
    tokenizer = SentencePieceTokenizer(file.read_bytes(), str(file))
    if settings != tokenizer.settings(has_json) or (has_json and _adds_tokens(directory, tokenizer.vocab_size)):
        return None
    return tokenizer


def _adds_tokens(directory: Path, pieces: int) -> bool:
    added = disk.read_json(directory / JSON_FILE).get("added_tokens", [])
    return any(token["id"] >= pieces for token in added)
