"""Tables of what a model needs in every number format: bytes of its weights, and of its cache by context."""

from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.devices import BITS, GGUF_BITS
from moe_reduce.models.parameters import parameter_count
from moe_reduce.planning.serving import cache_bytes, weight_bytes

CONTEXTS = (8_192, 32_768, 131_072, 1_000_000)  # tokens
CACHES = (16, 8, 4)  # bits of a cached value


def formats(model: ModelConfig) -> dict[str, Any]:
    """Bytes of the weights by format, widest first, and of one sequence's cache by context and bits of a value.

    Returns {parameters, bits_per_weight: {format: bits}, weight_bytes: {format: bytes},
    cache_bytes: {context: {bits: bytes}}}. Scales of a quantised cache are left out.
    """
    count = parameter_count(model)
    bits = dict(sorted((BITS | GGUF_BITS).items(), key=lambda entry: -entry[1]))
    return {
        "parameters": count,
        "bits_per_weight": bits,
        "weight_bytes": {name: weight_bytes(count, width) for name, width in bits.items()},
        "cache_bytes": {
            context: {width: cache_bytes(model, context, 1, width) for width in CACHES} for context in CONTEXTS
        },
    }
