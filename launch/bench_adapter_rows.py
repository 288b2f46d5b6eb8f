"""Decoding with adapters that are not merged: a batch of four rows without one, with one for all, and with four.

The base, the base with one LoRA, and the base with a bank of four LoRAs, one a row, decode in turn in one process, with
random weights: a dense model and a mixture of experts, whose experts are adapted too. Prints tokens per second of the
fastest round, and the ratio to the base.

Command: python launch/bench_adapter_rows.py    (--tiny for a quick check)
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence

import jax

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import bank
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, GenerateConfig, ModelConfig, MoEConfig
from moe_reduce.inference.generate import chunks, ready
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model

ROWS, PROMPT = 4, 32
DENSE = ModelConfig(
    vocab_size=8192, layers=8, width=512, query_heads=8, key_value_heads=4, head_width=64, feed_forward_width=1536
)
MIXTURE = dataclasses.replace(DENSE, feed_forward_width=None, moe=MoEConfig(experts=16, active=2, width=512))
TINY = {"vocab_size": 64, "layers": 2, "width": 32, "query_heads": 2, "key_value_heads": 2, "head_width": 16}


def measure(name: str, config: ModelConfig, tokens: int, repeats: int) -> None:
    """Prints a line for each number of adapters."""
    model = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve(jax.default_backend()))
    each = [adapters.init(AdapterConfig(rank=8, targets="attention,mlp", seed=seed), model) for seed in range(ROWS)]
    prompts = [[1 + (row + place) % 60 for place in range(PROMPT)] for row in range(ROWS)]
    models = {
        0: (model, None),
        1: (adapters.activate(model, each[0]), None),
        ROWS: (bank.activate(model, each), range(ROWS)),
    }
    prepared = {count: (ready(one), entries) for count, (one, entries) in models.items()}
    best = dict.fromkeys(models, 0.0)
    for _ in range(repeats + 1):  # the first round compiles, so it is never the best
        for count, (one, entries) in prepared.items():
            best[count] = max(best[count], _rate(one, prompts, tokens, entries))
    for count, rate in best.items():
        print(
            f"{name}, {ROWS} rows, adapters: {count}: {rate:,.0f} tokens/s, {rate / best[0]:.2f}× the base", flush=True
        )


def _rate(model: Model, prompts: list[list[int]], tokens: int, entries: Sequence[int] | None) -> float:
    """Tokens per second of decoding, without reading the prompts."""
    made = chunks(model, prompts, GenerateConfig(max_tokens=tokens), entries=entries)
    next(made)
    started = time.perf_counter()
    decoded = sum(len(ids) for new in made for ids in new)
    return decoded / (time.perf_counter() - started)


def main() -> None:
    """Measures both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a quick check")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    given = parser.parse_args()
    for name, config in (("dense", DENSE), ("mixture", MIXTURE)):
        if given.tiny:
            config = dataclasses.replace(config, **TINY)
        measure(name, config, 33 if given.tiny else 65, given.repeats)


if __name__ == "__main__":
    main()
