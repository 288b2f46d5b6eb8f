"""Reading of the tokenizer in a GGUF file's metadata: transformers' conversion, with splitting rules that it lacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import ARCHITECTURE, SHOWN, read_gguf
from moe_reduce.data import library_reader
from moe_reduce.data.library_tokenizer import LibraryTokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # values of tokenizer.ggml.model
# Values of tokenizer.ggml.pre, the rule by which text is split before merges. transformers has a table of others.
AS_GPT2 = (None, "default", "gpt-2", "olmo")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
AS_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")  # whole words are taken from the vocabulary, and texts begin with bos
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_gguf_tokenizer(path: Path) -> LibraryTokenizer:
    """Read the tokenizer of a GGUF file, with its special tokens and chat template.

    Raises UserError when the file has none, or one of an unknown kind.
    """
    metadata = read_gguf(path).metadata
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    try:
        _check(found)
        reader = _reader(found, str(metadata[ARCHITECTURE]), metadata.get(TEMPLATE))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged vocabulary makes the libraries raise many types
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        raise UserError(f"the tokenizer in {path} cannot be read ({reason}): fetch the file again") from error
    return library_reader.tokenizer_of(reader, path)


def _check(found: Mapping[str, Any]) -> None:
    kind, rule = found.get("model"), found.get("pre")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UserError(f"{PREFIX}model={kind!r} is not supported, only {BYTE_LEVEL} and {SENTENCEPIECE}")
    if kind == BYTE_LEVEL and rule not in _rules():
        raise UserError(f"{PREFIX}pre={rule!r} is not known: it decides how text is split; give a model directory")
    if "tokens" not in found:
        raise UserError(f"{PREFIX}tokens is missing: fetch the file again")


def _rules() -> tuple[str | None, ...]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return (*AS_GPT2, *SINGLE_DIGITS, *GGUF_PRE_TOKENIZER_SPLITS)


def _reader(found: Mapping[str, Any], architecture: str, template: str | None) -> Any:
    """The tokenizer as transformers' own class. found: metadata without PREFIX."""
    import transformers
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    keys = {f"ggml.{key}": value for key, value in found.items()}
    described = {name: keys[key] for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items() if key in keys}
    backend, _ = convert_gguf_tokenizer(architecture, described)
    _correct(backend, found)
    ids = {name: found[f"{key}_token_id"] for name, key in NAMES.items() if f"{key}_token_id" in found}
    begins = found["model"] == SENTENCEPIECE or found.get("pre") in AS_LLAMA3  # what llama.cpp does by default
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        add_bos_token=found.get("add_bos_token", begins) and "bos_token" in ids,
        add_eos_token=found.get("add_eos_token", False) and "eos_token" in ids,
        **{name: found["tokens"][identity] for name, identity in ids.items()},
    )


def _correct(backend: Any, found: Mapping[str, Any]) -> None:
    """Set what transformers' conversion leaves at its default."""
    from tokenizers import decoders, pre_tokenizers

    if found["model"] == SENTENCEPIECE:
        if not found.get("add_space_prefix", True):
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    elif found.get("pre") in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif found.get("pre") in AS_LLAMA3:
        backend.model.ignore_merges = True
