"""Bytes, FLOPs, and the exact parameter counts by component, from abstract leaves: no weight is ever made."""

import math
from collections.abc import Mapping
from typing import Any

from moe_reduce import trees
from moe_reduce.config import ModelConfig
from moe_reduce.models.deltas import ADAPTER

COMPONENTS = {  # the last of these names in a path decides its component
    "embedding": "embedding",
    "unembedding": "unembedding",
    "attention": "attention",
    "mlp": "feed_forward",
    "experts": "experts",
    "router": "router",
    "router_bias": "router_bias",
    "score_offset": "score_offset",
    "output_gain": "output_gain",
    "attention_norm": "norm",
    "mlp_norm": "norm",
    "final_norm": "norm",
    "query_norm": "norm",
    "key_norm": "norm",
    **dict.fromkeys(
        ("query_bias", "key_bias", "value_bias", "output_bias", "gate_bias", "up_bias", "down_bias"), "bias"
    ),
}


def component(path: str) -> str:
    """The component that a parameter path belongs to; an unnamed one raises KeyError, so the table stays total."""
    if path.startswith(f"{ADAPTER}/"):
        return ADAPTER
    parts = [part for part in path.split("/") if part in COMPONENTS]
    if not parts:
        raise KeyError(f"parameter {path} belongs to no component: add it to planning.COMPONENTS")
    return COMPONENTS[parts[-1]]


def counts_by_component(params: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters by component; leaves may be arrays or abstract."""
    counts: dict[str, int] = {}
    for path, leaf in trees.flatten(params).items():
        counts[component(path)] = counts.get(component(path), 0) + math.prod(leaf.shape)
    return dict(sorted(counts.items()))


def count(params: Mapping[str, Any]) -> int:
    """Total number of parameters."""
    return sum(counts_by_component(params).values())


def active_parameters(config: ModelConfig, params: Mapping[str, Any]) -> int:
    """Parameters that take part in one token: everything but the experts that it is not routed to.

    A token meets at most `active` experts in each layer, and of a pool no more than there are.
    """
    total = count(params)
    if config.moe is None:
        return total
    experts = counts_by_component(params)["experts"]
    one = 3 * config.width * config.moe.width
    return total - experts + min(experts, config.layers * config.moe.active * one)


def matmul_parameters_per_token(config: ModelConfig) -> int:
    """Parameters that one token is multiplied with: a pool counts once for each layer that calls it, biases never."""
    attention = config.width * config.head_width * 2 * (config.query_heads + config.key_value_heads)
    if config.moe is None:
        matrices = 3 if config.feed_forward == "swiglu" else 2
        feed_forward = matrices * config.width * (config.feed_forward_width or 0)
    else:
        feed_forward = config.moe.active * 3 * config.width * config.moe.width + config.width * config.moe.experts
    factor = config.embedding_factor
    output = config.vocab_size * config.width if factor is None else factor * (config.vocab_size + config.width)
    return config.layers * (attention + feed_forward) + output


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """2 FLOPs a matmul parameter, plus causal attention over on average half of the sequence.

    The input embedding is a lookup and costs nothing, except for its projection when it is factorised.
    """
    attention = 4 * config.layers * config.query_heads * config.head_width * (sequence_length + 1) / 2
    projection = 2 * (config.embedding_factor or 0) * config.width
    return 2 * matmul_parameters_per_token(config) + attention + projection


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward (three times forward); rematerialised work does not count, as usual for MFU."""
    return 3 * forward_flops_per_token(config, sequence_length)
