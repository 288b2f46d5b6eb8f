"""Inference memory of a model, the highest decode speed on a device, and the smallest change that makes it fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_reduce.core import schemes
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.devices import BITS, CACHE_BITS, Device
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import counts_by_component, parameters
from moe_reduce.planning.flops import forward_flops_per_token

FLOATS = {"float32": 4, "bfloat16": 2}  # bytes of a weight that is not quantised
CONTEXT_STEP = 256  # tokens; shorter contexts are multiples of this


@dataclass(frozen=True)
class Serving:
    """An inference workload: `batch` sequences of up to `context` tokens.

    dtype: float32, bfloat16, or the name of a scheme. cache_dtype: a name in CACHE_BITS.
    """

    model: ModelConfig
    context: int
    batch: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"


def needs(serving: Serving) -> dict[str, int]:
    """Bytes by kind: weights, kv_cache, and activations of a decode step (prompts are assumed to be read in chunks)."""
    return {
        "weights": sum(bytes_by_component(serving.model, serving.dtype).values()),
        "kv_cache": cache_bytes(serving.model, serving.context, serving.batch, CACHE_BITS[serving.cache_dtype]),
        "activations": activation_bytes(serving.model, serving.batch),
    }


def bytes_by_component(model: ModelConfig, dtype: str) -> dict[str, int]:
    """Bytes of the weights of each component, exactly. dtype: float32, bfloat16, or the name of a quantised scheme.

    With a scheme, all matrices but routers are quantised, as `quantize` does; the other weights are bfloat16. UserError
    for a scheme that does not fit a matrix.
    """
    found: dict[str, int] = {}
    for record in parameters(model):
        count = math.prod(record.shape)
        if dtype in FLOATS or not record.is_matrix or record.component == "router":
            size = count * FLOATS.get(dtype, 2)
        else:
            inputs, outputs = record.matrix_shape
            scheme = schemes.parse(dtype).fitted(inputs, record.path)
            size = count // (inputs * outputs) * scheme.bytes(inputs, outputs)
        found[record.component] = found.get(record.component, 0) + size
    return found


def weight_bytes(parameters: int, bits: float) -> int:
    """Bytes of a number of weights."""
    return round(parameters * bits / 8)


def cache_bytes(model: ModelConfig, context: int, batch: int, bits: float) -> int:
    """Bytes of the keys and values of all layers, 2 · N · G · C · T · B · bits / 8; without an int8 cache's scales.

    Latent attention caches one vector of its own width for all heads. A layer with linear attention holds a state in
    fp32 and the last inputs of its convolution in 16 bits, whatever the context and the cache's dtype.
    """
    heads = 2 * model.key_value_heads * model.head_width
    width = heads if model.latent is None else model.latent.cached_width
    linear = 0 if model.linear is None else len(model.linear.layers)
    states = 0
    if model.linear is not None:
        states = linear * batch * (4 * model.linear.state_size + 2 * (model.linear.taps - 1) * model.linear.channels)
    return round((model.layers - linear) * width * context * batch * bits / 8) + states


def activation_bytes(model: ModelConfig, batch: int) -> int:
    """Bytes of the fp32 logits, and of a layer's widest activations in 16 bits."""
    hidden = (model.moe.active * model.moe.width if model.moe else model.feed_forward_width) or 0
    return batch * (4 * model.vocab_size + 2 * (2 * model.width + 3 * hidden))


def bytes_read(serving: Serving) -> int:
    """Bytes that a decode step must read: the weights that its tokens use, and the whole cache."""
    cache = cache_bytes(serving.model, serving.context, serving.batch, CACHE_BITS[serving.cache_dtype])
    sizes, counts = bytes_by_component(serving.model, serving.dtype), counts_by_component(serving.model)
    return sum(sizes[name] * read // counts[name] for name, read in weights_read(serving).items()) + cache


def weights_read(serving: Serving) -> dict[str, int]:
    """Number of weights that a decode step reads, by component.

    B tokens use at most B · A experts of a layer. Rows of an untied input embedding are neglected.
    """
    model = serving.model
    counts = counts_by_component(model)
    if not model.tied_embeddings:
        counts["embedding"] = 0
    if model.moe is not None:
        one = sum(math.prod(record.matrix_shape) for record in parameters(model) if record.per_expert)
        used = model.expert_layers * min(model.moe.experts, serving.batch * model.moe.active) * one
        counts["experts"] = min(counts["experts"], used)
    return counts


def decode_bound(serving: Serving, device: Device) -> float:
    """Upper bound of tokens per second over all sequences: batch · bandwidth / bytes read in a step."""
    return serving.batch * device.bandwidth / bytes_read(serving)


def prompt_bound(serving: Serving, device: Device) -> float:
    """Upper bound of prompt tokens per second: bf16 peak / FLOPs of a token, for prompts that fill the context."""
    return device.flops / forward_flops_per_token(serving.model, serving.context)


def total(serving: Serving) -> int:
    """Total bytes."""
    return sum(needs(serving).values())


def remedies(serving: Serving, memory: int) -> list[tuple[str, Serving]]:
    """Changes that make the workload fit into `memory` bytes: (description, changed workload), smallest change first.

    Each entry changes one thing (dtype, cache dtype, context or experts) as little as suffices. If no single change
    suffices, entries combine a lower dtype with the smallest further change. [] if nothing makes it fit.
    """
    single = list(_changes(serving, memory))
    if not single:
        for name in _lower(BITS, serving.dtype):
            coarser = dataclasses.replace(serving, dtype=name)
            single = [(f"dtype={name} and {change}", found) for change, found in _changes(coarser, memory)]
            if single:
                break
    return sorted(single, key=lambda change: -total(change[1]))


def _changes(serving: Serving, memory: int) -> Iterator[tuple[str, Serving]]:
    def fits(other: Serving) -> bool:
        try:
            return total(other) <= memory
        except UserError:  # a scheme whose groups do not divide a matrix
            return False

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
            where = "" if moe.placement == "shared" else " per layer"
            yield f"{kept} of {moe.experts} experts{where}", _fewer(serving, kept)


def _lower(table: dict[str, float], name: str) -> list[str]:
    most = table[name] if name in table else schemes.parse(name).bits
    return [other for other, bits in table.items() if bits < most]


def _shorter(serving: Serving, steps: int) -> Serving:
    return dataclasses.replace(serving, context=steps * CONTEXT_STEP)


def _fewer(serving: Serving, experts: int) -> Serving:
    moe = serving.model.moe
    assert moe is not None
    model = dataclasses.replace(serving.model, moe=dataclasses.replace(moe, experts=experts))
    return dataclasses.replace(serving, model=model)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """Largest number from 1 to `most` for which `holds`, a property of every smaller number too; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
