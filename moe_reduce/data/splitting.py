"""Places at which a text can be divided without a change of its ids, for tokenizers whose steps are known.

A byte-level tokenizer splits a text by a regular expression before it looks its parts up. Those listed here end a part
behind a newline that stands between two other characters than spaces, and none looks at what lies before a part. A
tokenizer that splits nothing joins pairs of neighbours, and where no token holds a newline beside other text, none
joins over it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

NEWLINE = "\n"
META_SPACE = "▁"  # stands for a space inside a vocabulary
# of Qwen2 and Qwen3 (one digit a part), and of cl100k and Llama 3 (three digits); ByteLevel itself has that of GPT-2
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {f"{CONTRACTIONS}|{WORDS}|{numbers}|{SYMBOLS_AND_SPACES}" for numbers in (r"\p{N}", r"\p{N}{1,3}")}
NEUTRAL_STEPS = ({"type": "Digits", "individual_digits": True}, {"type": "Digits", "individual_digits": False})
LOCAL_NORMALIZERS = ("NFC", "NFD")  # a newline composes with nothing


@dataclass(frozen=True)
class Rule:
    """A condition for a cut behind a newline.

    between: characters other than spaces must stand on both sides of the newline. lead: ids of a newline that starts a
    text, to be dropped from the second part, which is encoded behind one; empty if nothing is put before a text.
    """

    between: bool
    lead: tuple[int, ...] = ()

    def parts(self, left: str, right: str) -> bool:
        """Tell whether left + right can be encoded in two parts."""
        if not left.endswith(NEWLINE) or not right:
            return False
        return not self.between or (not left[-2:-1].isspace() and len(left) > 1 and not right[0].isspace())


def newline_rule(backend: tokenizers.Tokenizer) -> Rule | None:
    """Find where texts can be cut for a tokenizer; None if its steps are not among the known ones."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or NEWLINE in token.content for token in added):
        return None
    if _splits_by_known_pattern(_steps(backend.normalizer), _steps(backend.pre_tokenizer)):
        return Rule(between=True)
    if not _splits_nothing(backend):
        return None
    lead = backend.encode(NEWLINE, add_special_tokens=False).ids
    if backend.token_to_id(backend.model.unk_token or "") in lead:  # unknown neighbours may become one token
        return None
    probe = backend.encode(f"{NEWLINE}a", add_special_tokens=False).ids
    return Rule(between=False, lead=tuple(lead)) if probe[: len(lead)] == lead else None


def by_words(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Make a tokenizer with the same ids that looks words up one by one, from a cache; itself where that is not sure.

    It is where a BPE joins neighbours over a whole text, and no piece holds a space behind another character.
    """
    model = backend.model
    if not _splits_nothing(backend) or model.ignore_merges or backend.token_to_id(META_SPACE) is None:
        return backend
    if any(re.search(f"[^{META_SPACE}]{META_SPACE}", piece) for piece in backend.get_vocab(with_added_tokens=False)):
        return backend
    found = tokenizers.Tokenizer.from_str(backend.to_str())
    found.encode_special_tokens = backend.encode_special_tokens
    words = pre_tokenizers.Split(tokenizers.Regex(f"{META_SPACE}*[^{META_SPACE}]+|{META_SPACE}+"), behavior="isolated")
    steps = [words] if backend.pre_tokenizer is None else [backend.pre_tokenizer, words]
    found.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return found


def prompt_tokens(offsets: Sequence[tuple[int, int]], characters: int) -> int:
    """Number of tokens that lie within the first `characters` of a text. offsets: where each begins and ends in it.

    Of the tokens of one character's bytes, all but the last may be empty.
    """
    behind = (index for index, (begin, end) in enumerate(offsets) if end > characters or begin >= characters)
    return next(behind, len(offsets))


def _steps(component: Any) -> list[dict[str, Any]]:
    """Settings of a normalizer or pre-tokenizer, one entry for each of its steps."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return next((state[key] for key in ("normalizers", "pretokenizers") if key in state), [state])


def _splits_by_known_pattern(normalizers: list[dict[str, Any]], steps: list[dict[str, Any]]) -> bool:
    if any(step["type"] not in LOCAL_NORMALIZERS for step in normalizers):
        return False
    steps = [step for step in steps if step not in NEUTRAL_STEPS]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if steps[-1]["use_regex"]:
        return len(steps) == 1
    return len(steps) == 2 and _is_known_split(steps[0])


def _is_known_split(step: dict[str, Any]) -> bool:
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    return step["pattern"].get("Regex") in PATTERNS


def _splits_nothing(backend: tokenizers.Tokenizer) -> bool:
    """Tell whether a BPE joins neighbours over a whole text, in which only spaces are replaced or put before it.

    No piece may hold a newline beside other text.
    """
    if not isinstance(backend.model, models.BPE) or not all(map(_replaces_spaces, _steps(backend.normalizer))):
        return False
    if any(step["type"] != "Metaspace" or step["split"] for step in _steps(backend.pre_tokenizer)):
        return False
    if backend.model.dropout or backend.model.continuing_subword_prefix or backend.model.end_of_word_suffix:
        return False
    return not any(NEWLINE in token and token != NEWLINE for token in backend.get_vocab(with_added_tokens=False))


def _replaces_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return step["pattern"] in ({"String": " "}, {"Regex": rf"\A{META_SPACE}"})  # of any text, or only of its start
    return step["type"] == "Prepend"
