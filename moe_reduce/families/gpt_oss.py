"""gpt-oss (arXiv:2508.10925): experts with biases and a clamped SwiGLU, sinks, and a window in every other layer.

The matrices of all experts of a layer are one tensor, with the columns of gate and up in turn.
"""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.families import common, rotary, windows
from moe_reduce.families.common import ATTENTION, LAYER
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor

# Rotary scaling of a file that states none.
SCALING = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = f"{LAYER}.mlp.experts"


class GptOss(HuggingFaceFamily):
    """The family, whose layers have a sliding window in turn."""

    def read(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json; UserError names a key that cannot be represented."""
        scaled = any(raw.get(group) for group in rotary.GROUPS)
        return super().read(raw if scaled else {**raw, "rope_parameters": SCALING})

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the sliding window."""
        layers = flat["num_hidden_layers"]
        types = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
        return windows.read(flat["sliding_window"], flat.get("layer_types") or types, layers)

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of the sliding window, without its width where no layer has one: transformers must have it."""
        types = {"layer_types": windows.types_of(config)}
        return types if config.sliding_window is None else types | {"sliding_window": config.sliding_window}


FAMILY = GptOss(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=common.KEYS
    | common.HEAD_WIDTH
    | {
        "moe.experts": Key("num_local_experts", int),
        "moe.active": Key("num_experts_per_tok", int),
        "moe.width": Key("intermediate_size", int),
        "swiglu_limit": Key("swiglu_limit", float),
        "swiglu_alpha": Key("swiglu_alpha", float),
    },
    fixed={
        "attention_biases": "all",
        "sinks": True,
        "feed_forward": "clamped_swiglu",
        "moe.normalize": True,
        "moe.biases": True,
    },
    derived_keys=frozenset({"sliding_window", "layer_types"}),
    defaults=common.DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 150_000.0,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    accepted=common.ACCEPTED | {"attention_bias": (True,)},
    constants={"hidden_act": "silu", "attention_bias": True},
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    neutral=frozenset({"initial_context_length"}),  # what rope_scaling says
    tensors=common.TENSORS
    | common.INPUT_BIAS_TENSORS
    | {
        "layers/attention/output_bias": Tensor(f"{ATTENTION}.o_proj.bias"),
        "layers/attention/sinks": Tensor(f"{ATTENTION}.sinks"),
        "layers/router/weight": Tensor(f"{LAYER}.mlp.router.weight"),
        "layers/router/bias": Tensor(f"{LAYER}.mlp.router.bias"),
        "layers/experts/gate": Tensor(f"{EXPERTS}.gate_up_proj", "E D F0"),
        "layers/experts/up": Tensor(f"{EXPERTS}.gate_up_proj", "E D F1"),
        "layers/experts/down": Tensor(f"{EXPERTS}.down_proj", "E F D"),
        "layers/experts/gate_bias": Tensor(f"{EXPERTS}.gate_up_proj_bias", "E F0"),
        "layers/experts/up_bias": Tensor(f"{EXPERTS}.gate_up_proj_bias", "E F1"),
        "layers/experts/down_bias": Tensor(f"{EXPERTS}.down_proj_bias", "E D"),
    },
    ignored=common.IGNORED,
)
