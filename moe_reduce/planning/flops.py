"""Bytes, FLOPs, and the exact parameter counts by component, from abstract leaves: no weight is ever made."""

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.parameters import counts_by_component, parameter_count


def active_parameters(config: ModelConfig) -> int:
    """Parameters that take part in one token: everything but the experts that it is not routed to.

    A token meets at most `active` experts in each layer, and of a pool no more than there are.
    """
    total = parameter_count(config)
    if config.moe is None:
        return total
    experts = counts_by_component(config)["experts"]
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
