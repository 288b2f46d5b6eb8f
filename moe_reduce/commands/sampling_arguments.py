"""Arguments of the commands that generate text: how tokens are chosen, and where a text ends."""

import argparse
import sys
from pathlib import Path

from moe_reduce.core.config import GenerateConfig

SHOWN_AT_ONCE = 4  # tokens, on a terminal


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --tokenizer, --max-tokens, --temperature, --top-k, --top-p, --seed, --stop and --cache-dtype."""
    default = GenerateConfig()
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.model, tokenizer.json or a directory (default: --model)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=default.max_tokens,
        help="most tokens of each continuation (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        help="sampling temperature; 0 takes the most probable token (default: 0)",
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most probable tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        default=default.top_p,
        help="sample from the most probable tokens whose probabilities sum to this (default: %(default)s, all)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of sampling (default: %(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], help="end a continuation before this string; may be repeated"
    )
    parser.add_argument(
        "--cache-dtype",
        choices=("auto", "int8", "fp8", "int4"),
        default=default.cache_dtype,
        help="dtype of cached keys and values; auto: the compute dtype (default: %(default)s)",
    )


def settings(arguments: argparse.Namespace, end_ids: tuple[int, ...] = ()) -> GenerateConfig:
    """The settings that the arguments give, with the token ids that end a text."""
    return GenerateConfig(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        end_ids=end_ids,
        cache_dtype=arguments.cache_dtype,
    )


def name_unapplied(arguments: argparse.Namespace) -> None:
    """Says on stderr which settings of generation_config.json the command does not follow."""
    from moe_reduce.inference.text import GENERATION_FILE, unapplied_settings

    given = {"top_k", "top_p", "temperature", "do_sample"} if arguments.temperature else set()
    found = {key: value for key, value in unapplied_settings(arguments.model).items() if key not in given}
    if found:
        named = ", ".join(f"{key}={value}" for key, value in found.items())
        print(f"note: {arguments.model}/{GENERATION_FILE} says {named}; only options set these", file=sys.stderr)
