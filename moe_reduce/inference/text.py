"""Text generation from text prompts: stop strings, and pieces of text to show as they are made."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_reduce.core.config import GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import Tokenizer
from moe_reduce.inference.generate import STEPS, chunks
from moe_reduce.models.model import Model

GENERATION_FILE, END_KEY = "generation_config.json", "eos_token_id"
# Settings that are used, that --max-tokens and the model's context replace, or that change no text.
APPLIED = frozenset({
    END_KEY, "bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache",
    "cache_implementation", "transformers_version", "return_dict_in_generate", "output_scores",
})  # fmt: skip
CONTEXT = 16  # prompt tokens decoded together with the new ones: a tokenizer may treat the start of a text differently
PARTIAL = "\ufffd"  # decoded form of an incomplete character


class Continuation:
    """A prompt, as ids, and its continuation so far, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        """UserError for an empty stop string."""
        if not all(stop):
            raise UserError("a stop string is empty: it would end every text at once")
        self.prompt, self.ids, self.text, self.stopped = list(prompt), [], "", False
        self._tokenizer, self._stop, self._shown = tokenizer, tuple(stop), 0
        self._start = len(self._decode([]).rstrip(PARTIAL))

    def add(self, ids: Sequence[int]) -> str:
        """Add ids, and return the new text that is certain: no half character, and no start of a stop string."""
        if not self.stopped:
            self.ids += ids
            self.text = self._decode(self.ids)[self._start :]
            found = [self.text.index(stop) for stop in self._stop if stop in self.text]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        return self._show(len(self.text) if self.stopped else self._certain())

    def rest(self) -> str:
        """Return the text that `add` held back, once no more ids come."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece, self._shown = self.text[self._shown : end], max(self._shown, end)
        return piece

    def _certain(self) -> int:
        text = self.text.rstrip(PARTIAL)
        return len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)

    def _decode(self, ids: Sequence[int]) -> str:
        known = [token for token in (*self.prompt[-CONTEXT:], *ids) if token < self._tokenizer.vocab_size]
        return self._tokenizer.decode(known)  # the embedding may be padded beyond the tokenizer's vocabulary


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`."""
    return next(size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size]))


def stream(
    model: Model,
    rows: Sequence[Continuation],
    settings: GenerateConfig,
    steps: int = STEPS,
    entries: Sequence[int] | None = None,
) -> Iterator[list[str]]:
    """Continue all rows together, and yield the new text of each row after every `steps` tokens.

    entries: as in `generate`.
    """
    for new in chunks(model, [row.prompt for row in rows], settings, steps, entries):
        yield [row.add(ids) for row, ids in zip(rows, new, strict=True)]
        if all(row.stopped for row in rows):
            break
    yield [row.rest() for row in rows]


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerateConfig,
    stop: Sequence[str],
    entries: Sequence[int] | None = None,
) -> list[str]:
    """Continue each prompt up to a stop string, an end of text or `max_tokens`. entries: as in `generate`."""
    rows = [Continuation(tokenizer, tokenizer.encode_prompt(prompt), stop) for prompt in prompts]
    for _ in stream(model, rows, settings, entries=entries):
        pass
    return [row.text for row in rows]


def end_ids(model: Model, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that end a text: those of the tokenizer, and those in generation_config.json and config.json.

    A chat model may end its turn with another token than its documents. UserError for ids that are no integers.
    """
    sources = [model.hf_config or {}, {} if model.source is None else _generation_config(model.source)]
    found = [source[END_KEY] for source in sources if END_KEY in source]
    several = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    ids = {*tokenizer.end_ids, *itertools.chain.from_iterable(several)}
    if not all(isinstance(one, int) for one in ids):
        raise UserError(f"{END_KEY} of {model.source} must be token ids, got {found}: see {GENERATION_FILE}")
    return tuple(sorted(ids))


def unapplied_settings(directory: Path) -> dict[str, Any]:
    """Settings of generation_config.json that change texts in transformers and not here, by name.

    Those that leave texts as they are without them, such as `num_beams: 1`, are not among them.
    """
    changed = _generation_config(directory)
    return {key: value for key, value in changed.items() if key not in APPLIED and not key.startswith("_")}


def _generation_config(directory: Path) -> dict[str, Any]:
    """Read the settings of generation_config.json that differ from transformers' defaults; empty without the file."""
    if not (directory / GENERATION_FILE).is_file():
        return {}
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(directory), local_files_only=True).to_diff_dict()
    except Exception as error:  # a file of others, whose values the library checks in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{directory / GENERATION_FILE} cannot be read ({reason}): restore it or remove it") from error
