"""Adapter of a model to the EleutherAI harness (lm-eval), so that any of its tasks runs on the model.

Every answer is that of lm-eval's own `hf` model on the same weights, except where that model ends with an error, and
where it puts the begin-of-text token before a text twice (rolling likelihoods).
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moe_reduce.core.config import GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import Tokenizer
from moe_reduce.inference import text
from moe_reduce.inference.generate import chunks, prepared, ready
from moe_reduce.inference.scoring import score
from moe_reduce.inference.task_settings import settings
from moe_reduce.models.model import Model

STEPS = 8  # tokens between two looks for stop strings
REMEMBERED = 64  # texts whose ids are kept: a context comes again with its next continuation
CERTAIN = (0.0, True)  # score of a continuation without tokens


class Harness(TemplateLM):
    """lm-eval's requests in batches, grouped by length; each context is computed once for all its continuations."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        batch_size: int,
        max_length: int | None = None,
        mesh: Mesh | None = None,
    ):
        """max_length: tokens of context at most; None for the model's own limit."""
        super().__init__()
        self._model, self._tokenizer, self._batch_size = prepared(model, mesh), tokenizer, batch_size
        self._ends = text.end_ids(model, tokenizer)
        self._encoded = functools.lru_cache(REMEMBERED)(self._encode)
        self.max_length = max_length or model.config.context

    @functools.cached_property
    def _decoding(self) -> Model:
        return ready(self._model)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_turn

    @functools.cached_property
    def prefix_token_id(self) -> int:  # type: ignore[override]
        """Token in front of a text without a context: begin of text, or the eos_token if the tokenizer has none."""
        begin = self._tokenizer.begin_of_text
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with a begin-of-text token unless `add_special_tokens` is False or the text begins with one."""
        return list(self._encoded(string, add_special_tokens is not False))

    def _encode(self, string: str, special: bool) -> tuple[int, ...]:
        if not special or (self._prefix and string.startswith(self._prefix)):
            return tuple(self._tokenizer.encode(string))
        return tuple(self._tokenizer.encode_prompt(string))

    @functools.cached_property
    def _prefix(self) -> str:
        return self._tokenizer.decode([self.prefix_token_id])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ log p of the continuation, whether it is the greedy one) for each request (context, continuation)."""
        pairs = [(request.args, *self._pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation. A context without tokens is replaced by the prefix token."""
        if context == "":
            return self._behind_prefix(self.tok_encode(continuation, add_special_tokens=False))
        context_ids, ids = self._encode_pair(context, continuation)
        if continuation and not ids:  # a token spans the border: what the context alone does not begin with is scored
            whole = self.tok_encode(context + continuation)
            shared = next(
                (place for place, (one, other) in enumerate(zip(whole, context_ids, strict=False)) if one != other),
                min(len(whole), len(context_ids)),
            )
            context_ids, ids = whole[:shared], whole[shared:]
        return (context_ids, ids) if context_ids else self._behind_prefix(ids)

    def _behind_prefix(self, ids: list[int]) -> tuple[list[int], list[int]]:
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **named: Any) -> list[tuple[float, bool]]:
        pairs = {}
        for index, (strings, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task asks for the likelihood of {len(continuation)} tokens ({_short(strings)}), and the "
                    f"model's context is {self.max_length}"
                )
            if continuation:
                # truncated on the left, like the harness: max_length tokens that are read, and the last, which is not
                kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
                split = len(kept) - len(continuation)
                pairs[index] = (kept[:split], kept[split:])
        found: list[tuple[float, bool]] = [CERTAIN] * len(requests)
        numbers = list(pairs)
        with tqdm(total=len(requests), unit="request", disable=_quiet(named), initial=len(found) - len(pairs)) as bar:
            for place, scored in score(self._model, list(pairs.values()), self._batch_size):
                found[numbers[place]] = (scored.log_likelihood, scored.greedy)
                bar.update()
        for (strings, _, _), answer in zip(requests, found, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of max_length tokens that share no target."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate texts up to a stop string, batching requests of equal settings."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with tqdm(total=len(requests), unit="request", disable=_quiet({"disable_tqdm": disable_tqdm})) as bar:
            for numbers in groups.values():
                wanted, stop = settings(requests[numbers[0]].args[1], self._ends)
                prompts = {number: self._prompt(requests[number].args[0], wanted) for number in numbers}
                for batch in self._batches(prompts):
                    # a row's random numbers depend on its index in the batch and on the seed
                    seeded = dataclasses.replace(wanted, seed=batch[0])
                    answers = self._answers([prompts[number] for number in batch], seeded, stop)
                    for number, made in zip(batch, answers, strict=True):
                        found[number] = made
                        self.cache_hook.add_partial("generate_until", requests[number].args, made)
                    bar.update(len(batch))
        return found

    def _prompt(self, string: str, wanted: GenerateConfig) -> list[int]:
        """Token ids of a prompt, the last ones that leave room for the answer; the prefix token for an empty one."""
        room = self.max_length - wanted.max_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {wanted.max_tokens} tokens, of which the model can hold {self.max_length}"
            )
        return (self.tok_encode(string) or [self.prefix_token_id])[-room:]

    def _batches(self, prompts: dict[int, list[int]]) -> Iterator[list[int]]:
        """Numbers of prompts in batches of similar length and of nearly equal size, so that few programs are needed."""
        numbers = sorted(prompts, key=lambda number: len(prompts[number]), reverse=True)
        count = -(-len(numbers) // self._batch_size)
        size = -(-len(numbers) // count)
        return (numbers[start : start + size] for start in range(0, len(numbers), size))

    def _answers(self, prompts: list[list[int]], wanted: GenerateConfig, stop: list[str]) -> list[str]:
        """Continue a batch of prompts up to a stop string."""
        rows: list[list[int]] = [[] for _ in prompts]
        for new in chunks(self._decoding, prompts, wanted, STEPS):
            for row, ids in zip(rows, new, strict=True):
                row.extend(ids)
            longest = max(map(len, rows))
            # a shorter row has ended
            if all(len(row) < longest or any(string in self._text(row) for string in stop) for row in rows):
                break
        return [self._answer(row, stop) for row in rows]

    def _answer(self, ids: list[int], stop: list[str]) -> str:
        """Text up to the first stop string, without special tokens, although a stop string may hold some."""
        text = self._text(ids, special=False)
        if any(string not in text and string in self._text(ids) for string in stop):
            ends = (end for end in range(len(ids)) if any(string in self._text(ids[:end]) for string in stop))
            text = self._text(ids[: next(ends, len(ids))], special=False)
        return min((text.split(string, 1)[0] for string in stop), key=len, default=text)

    def _text(self, ids: list[int], special: bool = True) -> str:
        """Text of generated ids alone: what a tokenizer drops at the start of a text, such as a blank, is dropped."""
        known = [token for token in ids if token < self._tokenizer.vocab_size]
        # the embedding may be padded beyond the tokenizer's vocabulary
        return self._tokenizer.decode(known, special)


def _quiet(named: dict[str, Any]) -> bool:
    return bool(named.get("disable_tqdm")) or not sys.stderr.isatty()


def _short(strings: tuple[str, str] | None) -> str:
    """The start of a request's continuation, for an error."""
    return "of a whole text" if strings is None else repr(strings[1][:40])
