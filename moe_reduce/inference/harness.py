"""Adapter of a model to the EleutherAI harness (lm-eval), so that any of its tasks runs on the model."""

import dataclasses
import sys
from collections.abc import Sequence
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
from moe_reduce.inference.generate import bucket, ready
from moe_reduce.inference.scoring import score
from moe_reduce.models.model import Model

MAX_TOKENS = 256  # length of a generation, if its task sets none


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
        self._model, self._tokenizer, self._batch_size = ready(model, mesh), tokenizer, batch_size
        self._ends = text.end_ids(model, tokenizer)
        self.max_length = max_length or model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """Token in front of a text without a context: begin of text, or end of text if the tokenizer has none."""
        begin = self._tokenizer.begin_of_text
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with a begin-of-text token unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string)
        return self._tokenizer.encode_prompt(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **named: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if not continuation:
                raise UserError("a task asks for the likelihood of an empty text")
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task asks for the likelihood of {len(continuation)} tokens, and the model's context is "
                    f"{self.max_length}"
                )
            # truncated on the left, like the harness: max_length tokens that are read, and the last one, which is not
            kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
            split = max(1, len(kept) - len(continuation))
            pairs.append((kept[:split], kept[split:]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        bar = tqdm(total=len(pairs), unit="request", disable=_quiet(named))
        with bar:
            for index, scored in score(self._model, pairs, self._batch_size):
                found[index] = (scored.log_likelihood, scored.greedy)
                strings = requests[index][0]
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, found[index])
                bar.update()
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
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate texts up to a stop string, batching requests of equal settings and length bucket."""
        found = [""] * len(requests)
        groups: dict[Any, list[int]] = {}
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for number, request in enumerate(requests):
            key = (repr(sorted(request.args[1].items())), bucket(len(prompts[number])))
            groups.setdefault(key, []).append(number)
        bar = tqdm(total=len(requests), unit="request", disable=_quiet({"disable_tqdm": disable_tqdm}))
        with bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self._batch_size):
                    batch = numbers[start : start + self._batch_size]
                    # a row's random numbers depend on its index in the batch and on the seed
                    texts = self._generate([prompts[number] for number in batch], requests[batch[0]].args[1], batch[0])
                    for number, made in zip(batch, texts, strict=True):
                        found[number] = made
                        self.cache_hook.add_partial("generate_until", requests[number].args, made)
                    bar.update(len(batch))
        return found

    def _generate(self, prompts: list[list[int]], wanted: dict[str, Any], seed: int) -> list[str]:
        """Continue a batch of prompts with a task's generation_kwargs."""
        settings, stop = self._settings(wanted)
        room = self.max_length - settings.max_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {settings.max_tokens} tokens, of which the model can hold {self.max_length}"
            )
        rows = [text.Continuation(self._tokenizer, prompt[-room:], stop) for prompt in prompts]
        for _ in text.stream(self._model, rows, dataclasses.replace(settings, seed=seed)):
            pass
        return [row.text for row in rows]

    def _settings(self, wanted: dict[str, Any]) -> tuple[GenerateConfig, list[str]]:
        """(settings, stop strings) for a task's generation_kwargs; sampled if do_sample or a temperature says so."""
        known = {"until", "max_gen_toks", "max_tokens", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
        for name in sorted(set(wanted) - known):
            raise UserError(f"a task sets {name}={wanted[name]!r} for generation, which generate does not have")
        stop = [wanted["until"]] if isinstance(wanted.get("until"), str) else list(wanted.get("until") or [])
        tokens = next(
            (wanted[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in wanted), MAX_TOKENS
        )
        settings = GenerateConfig(max_tokens=int(tokens), end_ids=self._ends)
        names = ("temperature", "top_k", "top_p")
        sampled: dict[str, Any] = {name: wanted[name] for name in names if wanted.get(name) is not None}
        draws = wanted.get("do_sample")
        if draws or (draws is None and "temperature" in sampled):
            settings = dataclasses.replace(settings, **({"temperature": 1.0} | sampled))
        return settings, [string for string in stop if string]


def _quiet(named: dict[str, Any]) -> bool:
    return bool(named.get("disable_tqdm")) or not sys.stderr.isatty()
