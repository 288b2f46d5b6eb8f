"""Writing of a tokenizer as metadata of a GGUF file; the inverse of gguf_tokenizer.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import is_gguf, read_gguf
from moe_reduce.data.gguf_tokenizer import BYTE_LEVEL, NAMES, PREFIX, SENTENCEPIECE, TEMPLATE
from moe_reduce.data.tokenizer_files import JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPACE = "▁"  # in pieces of SentencePiece
TEMPLATE_FILE = "chat_template.jinja"
LLAMA3_DIGITS = r"\p{N}{1,3}"  # a part of Llama 3's splitting pattern that others lack


def gguf_vocabulary(source: Path, vocab_size: int) -> dict[str, Any]:
    """Metadata that describes the tokenizer of a model directory or a GGUF file; {} where there is none.

    vocab_size: rows of the token table, which may be more than the tokenizer has. UserError for a tokenizer whose
    splitting rule llama.cpp has no name for.
    """
    if is_gguf(source):
        metadata = read_gguf(source).metadata
        return {key: value for key, value in metadata.items() if key.startswith(PREFIX) or key == TEMPLATE}
    if (source / SENTENCEPIECE_FILE).is_file():
        found = _sentencepiece(source / SENTENCEPIECE_FILE)
        _add_tokens(found, source / JSON_FILE)
    elif (source / JSON_FILE).is_file():
        found = _byte_level(source / JSON_FILE)
    else:
        return {}
    spare = vocab_size - len(found["tokens"])
    if spare < 0:
        raise UserError(f"the tokenizer of {source} has {len(found['tokens'])} tokens, the model {vocab_size}: fix one")
    found["tokens"] += [f"[PAD{number}]" for number in range(spare)]
    found["token_type"] += [UNUSED] * spare
    if "scores" in found:
        found["scores"] += [-1e4] * spare
    settings = json_files.read_object(source / SETTINGS_FILE) if (source / SETTINGS_FILE).is_file() else {}
    found |= _special(found["tokens"], settings)
    template = settings.get("chat_template")
    if (source / TEMPLATE_FILE).is_file():
        template = (source / TEMPLATE_FILE).read_text()
    return {f"{PREFIX}{key}": value for key, value in found.items()} | ({TEMPLATE: template} if template else {})


def _add_tokens(found: dict[str, Any], file: Path) -> None:
    """Add the tokens that follow SentencePiece's own, such as those of a chat, from a tokenizer.json beside it."""
    count = len(found["tokens"])
    added = json_files.read_object(file).get("added_tokens", ()) if file.is_file() else ()
    for token in sorted(added, key=lambda token: token["id"]):
        if token["id"] == len(found["tokens"]):
            found["tokens"].append(token["content"])
            found["token_type"].append(CONTROL if token["special"] else USER_DEFINED)
            found["scores"].append(0.0)
        elif token["id"] >= count:
            raise UserError(f"{file} has no token of id {len(found['tokens'])}: ids must follow each other")


def _special(tokens: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in NAMES.items():
        token = settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if text in tokens:
            found[f"{key}_token_id"] = tokens.index(text)
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(name), bool):
            found[name] = settings[name]
    return found


def _byte_level(file: Path) -> dict[str, Any]:
    """The vocabulary of a byte-level BPE."""
    content = json_files.read_object(file)
    model = content.get("model", {})
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(content.get("pre_tokenizer")):
        raise UserError(f"{file} is no byte-level BPE, the only kind of {JSON_FILE} that is written to GGUF")
    added = {token["id"]: token for token in content.get("added_tokens", ())}
    by_id = {identity: token for token, identity in model["vocab"].items()}
    by_id |= {identity: token["content"] for identity, token in added.items()}
    missing = next((identity for identity in range(len(by_id)) if identity not in by_id), None)
    if missing is not None:
        raise UserError(f"{file} has no token of id {missing}: ids must follow each other")
    kinds = {identity: CONTROL if token["special"] else USER_DEFINED for identity, token in added.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "model": BYTE_LEVEL,
        "pre": _rule(file, content["pre_tokenizer"], model),
        "tokens": [by_id[identity] for identity in range(len(by_id))],
        "token_type": [kinds.get(identity, NORMAL) for identity in range(len(by_id))],
        "merges": merges,
    }


def _rule(file: Path, splitter: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which text is split before merges."""
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    pattern = json.dumps(steps[0]).replace("\\\\", "\\")
    if kinds == ["Split", "ByteLevel"] and LLAMA3_DIGITS in pattern and model.get("ignore_merges"):
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == _qwen2_pattern():
        return "qwen2"
    raise UserError(f"{file} splits text by a rule that is not known here, so it cannot be written to GGUF")


def _qwen2_pattern() -> str:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return GGUF_PRE_TOKENIZER_SPLITS["qwen2"]


def _sentencepiece(file: Path) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    reader: Any = SentencePieceProcessor(model_file=str(file))
    count = reader.get_piece_size()
    kinds = {"is_unknown": UNKNOWN, "is_control": CONTROL, "is_unused": UNUSED, "is_byte": BYTE}
    return {
        "model": SENTENCEPIECE,
        "pre": "default",
        "add_space_prefix": reader.encode("a", out_type=str)[0].startswith(SPACE),
        "tokens": [reader.id_to_piece(number) for number in range(count)],
        "scores": [reader.get_score(number) for number in range(count)],
        "token_type": [
            next((kind for name, kind in kinds.items() if getattr(reader, name)(number)), NORMAL)
            for number in range(count)
        ],
    }
