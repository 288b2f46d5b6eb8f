"""Tokenizers of the `tokenizers` library, as transformers sets them up for a directory.

Tokenizing processes import this module: keep it free of JAX and of transformers.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moe_reduce.data.splitting import Rule, by_words, newline_rule, prompt_tokens
from moe_reduce.data.tokenizer_files import JSON_FILE, SETTINGS_FILE

TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Names:
    """Tokens with a role, and the chat template, of a tokenizer.

    special_tokens: token by role, such as "eos_token". end_of_text: id that separates documents.
    """

    end_of_text: int
    special_tokens: Mapping[str, str]
    chat_template: str | None = None


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library; special tokens spelled out in a text become special tokens.

    They do not where `split_special_tokens` is set.
    """

    def __init__(self, backend: tokenizers.Tokenizer, names: Names):
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.names = backend, names
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = {role: vocabulary[token] for role, token in names.special_tokens.items() if token in vocabulary}
        self.begin_of_text: int | None = ids.get("bos_token")
        self.end_of_text: int = names.end_of_text
        self.end_of_turn: int = ids.get("eos_token", self.end_of_text)
        self.end_ids: tuple[int, ...] = tuple(sorted({self.end_of_text, self.end_of_turn}))
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.base_size: int = backend.get_vocab_size(with_added_tokens=False)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restored, (self._backend.to_str(), self._backend.encode_special_tokens, self.names)

    @functools.cached_property
    def _by_words(self) -> tokenizers.Tokenizer:
        return by_words(self._backend)

    @functools.cached_property
    def _rule(self) -> Rule | None:
        return newline_rule(self._backend)

    @property
    def hash(self) -> str:
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        settings = json.dumps([self._backend.encode_special_tokens, self.end_of_text])
        return hashlib.sha256(f"tokenizers\0{settings}\0{self._backend.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._by_words.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        found = self._backend.encode(prompt + completion, add_special_tokens=False)
        opening = self._opening
        return [*opening, *found.ids], len(opening) + prompt_tokens(found.offsets, len(prompt))

    def parts(self, left: str, right: str) -> bool:
        return self._rule is not None and self._rule.parts(left, right)

    def encode_parts(self, texts: Sequence[str], continued: Sequence[bool]) -> list[list[int]]:
        lead = self._rule.lead if self._rule is not None and any(continued) else ()
        if not lead:
            return self.encode_batch(texts)
        given = [f"\n{text}" if follows else text for text, follows in zip(texts, continued, strict=True)]
        found = self.encode_batch(given)
        return [ids[len(lead) :] if follows else ids for ids, follows in zip(found, continued, strict=True)]

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        return self._backend.decode([int(identity) for identity in ids], skip_special_tokens=not special)

    def save(self, directory: Path) -> None:
        self._backend.save(str(directory / JSON_FILE))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names.special_tokens}
        settings |= {"clean_up_tokenization_spaces": False}
        settings |= {"split_special_tokens": True} if self._backend.encode_special_tokens else {}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (directory / SETTINGS_FILE).write_text(text, encoding="utf-8")
        if self.names.chat_template is not None:
            (directory / TEMPLATE_FILE).write_text(self.names.chat_template, encoding="utf-8")

    @functools.cached_property
    def _opening(self) -> list[int]:
        """Ids that `encode_prompt` puts before a text."""
        found = self._backend.encode("a", add_special_tokens=True)
        return found.ids[: [*found.special_tokens_mask, 0].index(0)]


def _restored(backend: str, split_special_tokens: bool, names: Names) -> LibraryTokenizer:
    found = tokenizers.Tokenizer.from_str(backend)
    found.encode_special_tokens = split_special_tokens
    return LibraryTokenizer(found, names)
