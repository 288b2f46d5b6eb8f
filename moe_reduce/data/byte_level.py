"""Byte-level BPE of Qwen2, 2.5 and 3 from vocab.json and merges.txt, for directories without a tokenizer.json."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moe_reduce.core.errors import UserError

# from the published tokenizer.json of Qwen2 (arXiv:2407.10671): one digit per token, at most one symbol before a word
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_vocabulary(directory: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Make the tokenizer of a directory with vocab.json and merges.txt. settings: its tokenizer_config.json.

    Raises UserError for families other than Qwen's, whose pattern for splitting words is not known here.
    """
    if "tokenizer_class" not in settings or settings["tokenizer_class"] not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise UserError(
            f"{directory} has vocab.json and merges.txt but its tokenizer_config.json does not say Qwen2Tokenizer: "
            "save it with transformers, so that it holds a tokenizer.json"
        )
    model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if "added_tokens_decoder" in settings:
        _add_tokens(tokenizer, settings["added_tokens_decoder"], directory)
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, added: dict[str, Any], directory: Path) -> None:
    for identity in sorted(added, key=int):
        tokenizer.add_tokens([tokenizers.AddedToken(**added[identity])])
        if tokenizer.token_to_id(added[identity]["content"]) != int(identity):
            raise UserError(f"{directory}/tokenizer_config.json: added token {identity} does not follow vocab.json")
