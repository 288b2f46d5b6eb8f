"""What a model takes when it answers, how fast a device can decode, and the smallest change that makes it fit."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.devices import BITS, CACHE_BITS, Device
from moe_reduce.models.parameters import counts_by_component

CONTEXT_STEP = 256  # tokens: contexts are shortened to a multiple of it


@dataclass(frozen=True)
class Serving:
    """A model at work: so many texts at once, each up to `context` tokens; dtypes of BITS and CACHE_BITS."""

    model: ModelConfig
    context: int
    batch: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"


def needs(serving: Serving) -> dict[str, int]:
    """Bytes by kind: weights, kv_cache, and activations of a decoding step (prompts are read in pieces)."""
    return {
        "weights": weight_bytes(sum(_counts(serving.model).values()), BITS[serving.dtype]),
        "kv_cache": cache_bytes(serving.model, serving.context, serving.batch, CACHE_BITS[serving.cache_dtype]),
        "activations": activation_bytes(serving.model, serving.batch),
    }


@cache
def _counts(model: ModelConfig) -> dict[str, int]:
    return counts_by_component(model)


def weight_bytes(parameters: int, bits: float) -> int:
    """P · bits / 8."""
    return round(parameters * bits / 8)


def cache_bytes(model: ModelConfig, context: int, batch: int, bits: float) -> int:
    """2 · N · G · C · T · B · bits / 8: keys and values of all layers; scales of an int8 cache are not counted."""
    return round(2 * model.layers * model.key_value_heads * model.head_width * context * batch * bits / 8)


def activation_bytes(model: ModelConfig, batch: int) -> int:
    """fp32 logits, and the widest that a layer makes of a token, in 16 bit."""
    hidden = model.feed_forward_width or (model.moe.active * model.moe.width if model.moe else 0)
    return batch * (4 * model.vocab_size + 2 * (2 * model.width + 3 * hidden))


def bytes_read(serving: Serving) -> int:
    """What a decoding step reads at least: the weights that its tokens meet, and the whole cache.

    B tokens meet at most B · A experts of a layer. A row of an untied input embedding costs nothing beside the rest.
    """
    model = serving.model
    counts = _counts(model)
    read = sum(counts.values()) - (0 if model.tied_embeddings else counts["embedding"])
    if model.moe is not None:
        one = 3 * model.width * model.moe.width
        met = model.layers * min(model.moe.experts, serving.batch * model.moe.active) * one
        read += min(counts["experts"], met) - counts["experts"]
    cache = cache_bytes(model, serving.context, serving.batch, CACHE_BITS[serving.cache_dtype])
    return weight_bytes(read, BITS[serving.dtype]) + cache


def decode_bound(serving: Serving, device: Device) -> float:
    """Tokens a second, of all texts together, at the device's bandwidth: no decoder of these bytes is faster."""
    return serving.batch * device.bandwidth / bytes_read(serving)


def total(serving: Serving) -> int:
    """Bytes in all."""
    return sum(needs(serving).values())


def remedies(serving: Serving, memory: int) -> list[tuple[str, Serving]]:
    """Changes that make it fit, each the smallest of its kind, the smallest of all first; each checked by `total`.

    One kind at a time; where none suffices, fewer bits and the smallest further change. [] where nothing does.
    """
    single = list(_changes(serving, memory))
    if not single:
        for name in _lower(BITS, serving.dtype):
            coarser = dataclasses.replace(serving, dtype=name)
            single = [(f"dtype={name} and {what}", found) for what, found in _changes(coarser, memory)]
            if single:
                break
    return sorted(single, key=lambda change: -total(change[1]))


def _changes(serving: Serving, memory: int) -> Iterator[tuple[str, Serving]]:
    def fits(other: Serving) -> bool:
        return total(other) <= memory

    for key, table in (("dtype", BITS), ("cache_dtype", CACHE_BITS)):
        for name in _lower(table, getattr(serving, key)):
            other = dataclasses.replace(serving, **{key: name})
            if fits(other):
                yield f"{key}={name}", other
                break
    steps = _largest(serving.context // CONTEXT_STEP, lambda n: fits(_shorter(serving, n)))
    if steps:
        yield f"context={steps * CONTEXT_STEP}", _shorter(serving, steps)
    moe = serving.model.moe
    if moe is not None:
        spare = moe.experts - moe.active
        kept = moe.active - 1 + _largest(spare + 1, lambda n: fits(_fewer(serving, moe.active - 1 + n)))
        if kept >= moe.active:
            where = "" if moe.placement == "shared" else " a layer"
            yield f"{kept} of {moe.experts} experts{where}", _fewer(serving, kept)


def _lower(table: dict[str, float], name: str) -> list[str]:
    return [other for other, bits in table.items() if bits < table[name]]


def _shorter(serving: Serving, steps: int) -> Serving:
    return dataclasses.replace(serving, context=steps * CONTEXT_STEP)


def _fewer(serving: Serving, experts: int) -> Serving:
    moe = serving.model.moe
    assert moe is not None
    model = dataclasses.replace(serving.model, moe=dataclasses.replace(moe, experts=experts))
    return dataclasses.replace(serving, model=model)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that holds, where all below one that holds do too; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
