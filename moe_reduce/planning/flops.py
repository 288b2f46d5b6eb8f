"""FLOPs and active parameters of a token, from the parameter records."""

import math

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.parameters import Parameter, parameter_count, parameters


def active_parameters(config: ModelConfig) -> int:
    """Parameters that take part in one token: everything but the experts that it is not routed to.

    A token is routed to `active` experts in each layer, and to no more experts of a shared pool than there are.
    """
    if config.moe is None:
        return parameter_count(config)
    experts = [record for record in parameters(config) if record.per_expert]
    total = sum(math.prod(record.shape) for record in experts)
    one = sum(math.prod(record.matrix_shape) for record in experts)
    return parameter_count(config) - total + min(total, config.expert_layers * config.moe.active * one)


def matmul_parameters_per_token(config: ModelConfig) -> int:
    """Weights that one token is multiplied with; those of a shared pool count in every layer that uses them."""
    return sum(_products(config, record) * math.prod(record.matrix_shape) for record in parameters(config))


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a forward pass: 2 for each matmul parameter, plus 4 · head width for each key that a query reads.

    In latent attention half of these are for keys and half for values, which have a width of their own. In linear
    attention a token reads its state twice and writes it once, 2 for each number and time, and a convolution precedes.

    The input embedding is a lookup and costs nothing, except for its projection if it is factorised.
    """
    width = config.head_width if config.latent is None else (config.head_width + config.latent.value_width) / 2
    attention = 4 * width * Visibility(config).keys_per_token(sequence_length)
    projection = 2 * (config.embedding_factor or 0) * config.width
    return 2 * matmul_parameters_per_token(config) + attention + _linear_attention(config) + projection


def _linear_attention(config: ModelConfig) -> int:
    """FLOPs of a token's states in all layers with linear attention."""
    if config.linear is None:
        return 0
    sizes = config.linear
    return len(sizes.layers) * (6 * sizes.state_size + 2 * sizes.channels * sizes.taps)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward: three times forward. Recomputation does not count, as usual for MFU."""
    return 3 * forward_flops_per_token(config, sequence_length)


def _products(config: ModelConfig, record: Parameter) -> int:
    """Number of products of one token with one of the parameter's matrices, over all layers."""
    if not record.is_matrix or (record.component == "embedding" and not config.tied_embeddings):
        return 0  # an untied input embedding is only looked up
    if record.per_expert and config.moe is not None:
        return config.expert_layers * config.moe.active
    # every layer uses a shared router
    return len(record.layers) if record.stacked else config.expert_layers if record.expert_axis is not None else 1
