"""GLM-4.5, GLM-4.6 and Air (arXiv:2508.06471): the experts of DeepSeek-V3 with grouped heads, half of each rotated."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.families import common
from moe_reduce.families.deepseek import EXPERT_KEYS, EXPERT_TENSORS, SIGMOID, expert_fields, expert_keys
from moe_reduce.families.huggingface import ROPE, HuggingFaceFamily
from moe_reduce.families.key import Key

SHARE = "partial_rotary_factor"


class Glm4MoE(HuggingFaceFamily):
    """The family, with dense layers before those with experts."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of experts, dense layers and biases."""
        biases = Key("attention_bias", bool).value(flat)
        return expert_fields(flat) | {"attention_biases": "inputs" if biases else "none"}

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of experts, dense layers and biases."""
        return expert_keys(config) | {"attention_bias": config.attention_biases == "inputs"}


TENSORS = common.TENSORS | common.INPUT_BIAS_TENSORS | common.QK_NORM_TENSORS

FAMILY = Glm4MoE(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=common.KEYS
    | common.HEAD_WIDTH
    | EXPERT_KEYS
    | {
        "qk_norm": Key("use_qk_norm", bool),
        "rotary_share": Key(SHARE, float),
        "moe.normalize": Key("norm_topk_prob", bool),
        "moe.groups": Key("n_group", int),
        "moe.active_groups": Key("topk_group", int),
    },
    fixed=SIGMOID,
    derived_keys=frozenset({"intermediate_size", "n_shared_experts", "attention_bias"}),
    derived_names={"feed_forward_width": "intermediate_size", "moe.shared_width": "n_shared_experts"},
    defaults=common.DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        SHARE: 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
    },
    accepted=common.ACCEPTED,
    constants={"hidden_act": "silu"},
    rope={**ROPE, SHARE: SHARE},
    aliases={"num_local_experts": "n_routed_experts"},
    neutral=common.NEXT_TOKENS,
    tensors=TENSORS | EXPERT_TENSORS | common.of_dense_layers(TENSORS | common.DENSE_TENSORS),
    ignored=common.IGNORED,
    next_tokens=True,
)
