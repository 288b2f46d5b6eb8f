"""Qwen2-MoE (arXiv:2407.10671): Qwen2 with experts, and a block beside them whose output is scaled for each token."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.families import common
from moe_reduce.families.common import LAYER
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor
from moe_reduce.families.qwen2 import UNREAD, WINDOW_KEYS, head_field, head_key, window_fields, window_keys


class Qwen2MoE(HuggingFaceFamily):
    """The family, in which every other layer may have a sliding window, and biases may be absent."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the sliding window and of biases."""
        windowed = range(0, min(flat["num_hidden_layers"], flat["max_window_layers"]), 2)
        types = [
            "sliding_attention" if layer in windowed else "full_attention" for layer in range(flat["num_hidden_layers"])
        ]
        biases = Key("qkv_bias", bool).value(flat)
        return window_fields(flat, types) | head_field(flat) | {"attention_biases": "inputs" if biases else "none"}

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of the sliding window and of biases."""
        return window_keys(config) | head_key(config) | {"qkv_bias": config.attention_biases == "inputs"}


SHARED = f"{LAYER}.mlp.shared_expert"
SHARED_TENSORS = {
    "layers/shared_expert/gate": Tensor(f"{SHARED}.gate_proj.weight"),
    "layers/shared_expert/up": Tensor(f"{SHARED}.up_proj.weight"),
    "layers/shared_expert/down": Tensor(f"{SHARED}.down_proj.weight"),
    "layers/shared_expert_gate": Tensor(f"{LAYER}.mlp.shared_expert_gate.weight", "0 D"),
}

FAMILY = Qwen2MoE(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=common.KEYS
    | common.EXPERT_KEYS
    | {
        "moe.width": Key("moe_intermediate_size", int),
        "moe.shared_width": Key("shared_expert_intermediate_size", int),
    },
    fixed={"moe.shared_gate": True},
    derived_keys=WINDOW_KEYS | {"head_dim", "qkv_bias"},
    derived_names={"head_width": "head_dim"},
    defaults=common.DEFAULTS
    | {
        "max_position_embeddings": 32_768,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    accepted=common.ACCEPTED,
    constants={"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []},
    aliases=common.EXPERT_ALIASES,
    neutral=UNREAD | {"intermediate_size"},  # the width of dense layers, which there are none of
    tensors=common.TENSORS | common.INPUT_BIAS_TENSORS | common.EXPERT_TENSORS | SHARED_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="qwen2moe",
        keys=common.gguf_expert_keys()
        | {"shared_expert_intermediate_size": Key("expert_shared_feed_forward_length", int)},
        equal=common.GGUF_EQUAL,
        accepted=common.GGUF_EXPERT_ACCEPTED | {"expert_weights_norm": (False,)},
        constants={"norm_topk_prob": False},
        unread=frozenset({"feed_forward_length"}),
        tensors=common.GGUF_TENSORS
        | common.GGUF_INPUT_BIAS_TENSORS
        | common.GGUF_EXPERT_TENSORS
        | {
            "layers/shared_expert/gate": Tensor(f"{common.BLOCK}.ffn_gate_shexp.weight"),
            "layers/shared_expert/up": Tensor(f"{common.BLOCK}.ffn_up_shexp.weight"),
            "layers/shared_expert/down": Tensor(f"{common.BLOCK}.ffn_down_shexp.weight"),
            "layers/shared_expert_gate": Tensor(f"{common.BLOCK}.ffn_gate_inp_shexp.weight", "D"),
        },
    ),
)
