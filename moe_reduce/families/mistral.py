"""Mistral, dense (arXiv:2310.06825): LLaMA with grouped heads and, in the first version, a sliding window."""

from moe_reduce.families import common
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key

WINDOW = {"sliding_window": Key("sliding_window", int, optional=True)}

FAMILY = HuggingFaceFamily(
    name="mistral",
    architecture="MistralForCausalLM",
    keys=common.KEYS | common.HEAD_WIDTH | common.DENSE_KEYS | WINDOW,
    defaults=common.DEFAULTS | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    accepted=common.ACCEPTED,
    constants={"hidden_act": "silu"},
    tensors=common.TENSORS | common.DENSE_TENSORS,
    ignored=common.IGNORED,
)
