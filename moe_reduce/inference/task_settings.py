"""Generation settings of lm-eval's tasks: those that generation has, and those that change nothing."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import GenerateConfig
from moe_reduce.core.errors import UserError

MAX_TOKENS = 256  # length of an answer, if its task sets none
TOP_K = 50  # of sampled answers, if their task sets none: the default of transformers, which lm-eval's `hf` model has
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
READ = ("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS)
# values under which a setting of transformers, or of vLLM, does nothing
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "n": 1, "best_of": 1,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1,
    "frequency_penalty": 0, "presence_penalty": 0, "diversity_penalty": 0, "penalty_alpha": 0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": 0, "min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True,
}  # fmt: skip
# values under which a filter of sampled tokens does nothing; greedy answers have none
NEUTRAL_FILTERS = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
ANY_VALUE = ("length_penalty", "early_stopping", "use_cache", "pad_token_id", "renormalize_logits")  # beams, memory


def settings(wanted: Mapping[str, Any], end_ids: tuple[int, ...]) -> tuple[GenerateConfig, list[str]]:
    """(settings, stop strings) for a task's generation_kwargs; sampled if do_sample or a temperature says so.

    None stands for a setting that is not given. UserError for one that generation does not have.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
    sampled = bool(given.get("do_sample", temperature > 0)) and temperature > 0
    _check(given, sampled)
    tokens = next((given[name] for name in LENGTHS if name in given), MAX_TOKENS)
    until = given.get("until", [])
    stop = [str(string) for string in ([until] if isinstance(until, str) else until) if string]
    if not sampled:
        return GenerateConfig(max_tokens=int(tokens), end_ids=end_ids), stop
    top_k = int(given.get("top_k", TOP_K))
    found = GenerateConfig(
        max_tokens=int(tokens), end_ids=end_ids, temperature=temperature, top_k=top_k if top_k > 0 else None,
        top_p=float(given.get("top_p", 1.0)),
    )  # fmt: skip
    return found, stop


def _check(given: Mapping[str, Any], sampled: bool) -> None:
    """Raise UserError for the first setting that would change answers and that generation does not have."""
    neutral = NEUTRAL | NEUTRAL_FILTERS
    accepted = {*READ, *ANY_VALUE, *(() if sampled else NEUTRAL_FILTERS)}
    for name in sorted(set(given) - accepted):
        if name not in neutral or given[name] != neutral[name]:
            raise UserError(
                f"a task sets {name}={given[name]!r} for generation, which generate does not have: leave it out"
            )
