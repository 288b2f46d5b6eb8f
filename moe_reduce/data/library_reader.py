"""Reading of a tokenizer's directory by transformers: vocabulary, settings, added tokens and chat template."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from moe_reduce.core import disk
from moe_reduce.core.errors import UserError
from moe_reduce.data.library_tokenizer import LibraryTokenizer, Names
from moe_reduce.data.tokenizer_files import (
    JSON_FILE,
    MERGES_FILE,
    MODEL_FILE,
    READ_AS,
    SENTENCEPIECE_FILE,
    SETTINGS_FILE,
    VOCABULARY_FILE,
)

# the token that separates documents is the first of these in the vocabulary, else the file's own eos_token
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SHOWN = 200  # characters of an error of the library


def read_directory(directory: Path) -> LibraryTokenizer:
    """Read a directory as AutoTokenizer does, without the network and without code from it.

    Raises UserError when there is no tokenizer, when it is damaged, and when it has no token that separates documents.
    """
    if not any((directory / name).is_file() for name in (JSON_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE)):
        raise UserError(
            f"{directory} holds no {JSON_FILE}, {SENTENCEPIECE_FILE}, or {VOCABULARY_FILE} with {MERGES_FILE}: name "
            "another tokenizer"
        )
    with _reading(directory):
        import transformers

        reader: Any = transformers.AutoTokenizer.from_pretrained(
            str(directory), config=_config(directory), local_files_only=True, trust_remote_code=False
        )
    return tokenizer_of(reader, directory)


def read_file(path: Path) -> LibraryTokenizer:
    """Read a file of the tokenizers library on its own, with the names of special tokens in the settings beside it."""
    settings = _read_json(path.parent / SETTINGS_FILE)
    names = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    with _reading(path):
        import transformers

        reader: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **names)
    return tokenizer_of(reader, path)


def tokenizer_of(reader: Any, origin: Path) -> LibraryTokenizer:
    """The tokenizer in an object of transformers; UserError, naming `origin`, when it cannot serve here."""
    backend = getattr(reader, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UserError(
            f"{origin} is read by {type(reader).__name__}, which the tokenizers library does not know: save it with "
            f"transformers, so that it holds a {JSON_FILE}"
        )
    backend.encode_special_tokens = bool(reader.split_special_tokens)
    special_tokens = dict(reader.special_tokens_map)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = (*END_OF_TEXT_NAMES, special_tokens.get("eos_token"))
    end_of_text = next((vocabulary[name] for name in names if name in vocabulary), None)
    if end_of_text is None:
        raise UserError(f"{origin} has none of {', '.join(END_OF_TEXT_NAMES)}: name its eos_token in {SETTINGS_FILE}")
    return LibraryTokenizer(backend, Names(end_of_text, special_tokens, _template(reader)))


def _template(reader: Any) -> str | None:
    template = reader.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _config(directory: Path) -> Any:
    """Make the part of a model's configuration that chooses the class of its tokenizer, whatever else config.json has.

    A model that a reduction has made one of our own family is read as the model that it was made from.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    raw = _read_json(directory / MODEL_FILE)
    kind = raw.get(READ_AS, raw.get("model_type"))
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES:
        config = AutoConfig.for_model(kind)
    else:
        config = PreTrainedConfig()
    for key in ("tokenizer_class", "model_name"):
        if isinstance(raw.get(key), str):
            setattr(config, key, raw[key])
    config._name_or_path = str(directory)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    found = disk.read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(found).__name__}: restore it or remove it")
    return found


@contextlib.contextmanager
def _reading(origin: Path) -> Iterator[None]:
    """Keep the library's remarks off the terminal, and turn whatever it raises into a line that names the file."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it recommends PyTorch, which nothing here needs
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # many types; and a panic of the Rust library is no Exception
        raise _damaged(origin, error) from error
    finally:
        logging.set_verbosity(before)


def _damaged(origin: Path, error: BaseException) -> UserError:
    files = [origin] if origin.is_file() else [origin / JSON_FILE, origin / SENTENCEPIECE_FILE]
    for file in filter(Path.is_file, files):
        if file.name == SENTENCEPIECE_FILE:
            from moe_reduce.data.sentencepiece_tokenizer import SentencePieceTokenizer

            SentencePieceTokenizer(file.read_bytes(), str(file))  # raises UserError for a damaged file
        elif reason := _unreadable_json(file):
            return UserError(f"{file} is not a {JSON_FILE} ({reason}): is it cut short, or a Git LFS pointer?")
    return UserError(f"the tokenizer of {origin} cannot be read ({_first_line(error)}): restore its files")


def _unreadable_json(file: Path) -> str | None:
    try:
        tokenizers.Tokenizer.from_str(json.dumps(json.loads(file.read_text(encoding="utf-8"))))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:SHOWN]
