"""One protocol for all tokenizers, and the choice of the library that reads one.

A directory is read by transformers, as its AutoTokenizer would: settings, added tokens and all. SentencePiece reads
what was trained here, and a tokenizer.model on its own. Tokenizing processes import this module: keep it free of JAX.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import is_gguf
from moe_reduce.data.sentencepiece_tokenizer import SentencePieceTokenizer, trained_here
from moe_reduce.data.tokenizer_files import EXTRA_FILES, JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE


class Tokenizer(Protocol):
    """Conversion of text to token ids and back; can be pickled."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def base_size(self) -> int:
        """Size of the vocabulary without the tokens that were added to it."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id that follows each document."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: end of text, and the eos_token, which may end a turn of a chat."""
        ...

    @property
    def end_of_turn(self) -> int:
        """Id of the eos_token: ends a text that a model writes; that of end of text where a tokenizer names none."""
        ...

    @property
    def begin_of_text(self) -> int | None:
        """Id that may start a text; None if the vocabulary has none."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the ids: the reader's kind, vocabulary, settings and special tokens."""
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

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Encode a prompt and its completion as one text: (ids, number of those that belong to the prompt).

        The ids begin as those of `encode_prompt` do, and nothing is added after the text. A token that holds the end
        of the prompt and the start of the completion belongs to the completion.
        """
        ...

    def parts(self, left: str, right: str) -> bool:
        """Tell whether a text that reads left + right can be encoded in these two parts, by `encode_parts`.

        True only where the tokenizer is known to give the ids of the whole text.
        """
        ...

    def encode_parts(self, texts: Sequence[str], continued: Sequence[bool]) -> list[list[int]]:
        """Encode each text as `encode` does, or where `continued`, as the part of a text that follows a newline."""
        ...

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """Decode ids. special: with special tokens, those that a tokenizer does not take for text, as far as it has a
        text for them."""
        ...

    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer` and transformers' AutoTokenizer read."""
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from a directory, or from a .model, .json or .gguf file.

    A directory holds tokenizer.json, tokenizer.model, or vocab.json and merges.txt. A file with a tokenizer_config.json
    beside it is read as its directory is.
    Raises UserError when there is no tokenizer or it is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"tokenizer {str(path)!r} does not exist: give a {SENTENCEPIECE_FILE}, a {JSON_FILE} or `train`"
        )
    if is_gguf(path):
        from moe_reduce.data.gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(path)
    if path.suffix == ".json":
        return _read_json(path)
    if path.is_file() and (path.name != SENTENCEPIECE_FILE or not _has_settings(path.parent)):
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    directory = path if path.is_dir() else path.parent
    trained = trained_here(directory)
    if trained is not None:
        return trained
    from moe_reduce.data import library_reader  # takes a second to import, and only such directories need it

    return library_reader.read_directory(directory)


def _read_json(path: Path) -> Tokenizer:
    from moe_reduce.data import library_reader

    return library_reader.read_directory(path.parent) if path.name == JSON_FILE else library_reader.read_file(path)


def _has_settings(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (SETTINGS_FILE, *EXTRA_FILES))
