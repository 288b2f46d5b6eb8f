"""Keys and tensor names that the families of DeepSeek share, and those that took their experts."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.attention_config import LatentAttention
from moe_reduce.core.config import ModelConfig
from moe_reduce.families import common
from moe_reduce.families.common import LAYER
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor

EXPERT_KEYS = {
    "dense_layers": Key("first_k_dense_replace", int),
    "moe.experts": Key("n_routed_experts", int),
    "moe.active": Key("num_experts_per_tok", int),
    "moe.width": Key("moe_intermediate_size", int),
    "moe.weight_scale": Key("routed_scaling_factor", float),
}
# Sigmoid scores, chosen by score plus bias in the groups whose best two are best.
SIGMOID = {
    "moe.score_function": "sigmoid",
    "moe.selection_bias": True,
    "moe.bias_on": "scores_of_choice",
    "moe.group_score": "best_two",
}
LATENT_KEYS = frozenset(
    {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_key_value_heads"}
)
BIAS_TENSOR = {"layers/router_bias": Tensor(f"{LAYER}.mlp.gate.e_score_correction_bias")}
EXPERT_TENSORS = common.EXPERT_TENSORS | common.SHARED_TENSORS | BIAS_TENSOR
# Keys of published files that transformers does not read.
ACCEPTED = {"moe_layer_freq": (1,)}
NEUTRAL = frozenset({"aux_loss_alpha", "ep_size", "head_dim", "qk_head_dim", "seq_aux"}) | common.NEXT_TOKENS


def expert_fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the blocks beside experts, and of the dense layers before them."""
    shared = Key("n_shared_experts", int, optional=True).value(flat)
    width = Key("moe_intermediate_size", int).value(flat)
    dense = Key("first_k_dense_replace", int).value(flat)
    return {
        "moe.shared_width": shared * width if shared else None,
        "feed_forward_width": Key("intermediate_size", int).value(flat) if dense else None,
    }


def expert_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of the blocks beside experts, and of the dense layers before them."""
    moe = config.moe
    assert moe is not None
    keys: dict[str, Any] = {"n_shared_experts": (moe.shared_width or 0) // moe.width}
    return keys if config.feed_forward_width is None else keys | {"intermediate_size": config.feed_forward_width}


class DeepSeek(HuggingFaceFamily):
    """A family with latent attention, and dense layers before those with experts."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of latent attention and of experts."""
        widths = {name: Key(name, int).value(flat) for name in sorted(LATENT_KEYS - {"q_lora_rank"})}
        latent = LatentAttention(
            rank=widths["kv_lora_rank"],
            rotary_width=widths["qk_rope_head_dim"],
            value_width=widths["v_head_dim"],
            query_rank=Key("q_lora_rank", int, optional=True).value(flat),
        )
        head_width = widths["qk_nope_head_dim"] + widths["qk_rope_head_dim"]
        heads = widths["num_key_value_heads"]
        return expert_fields(flat) | {"latent": latent, "head_width": head_width, "key_value_heads": heads}

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of latent attention and of experts."""
        latent = config.latent or LatentAttention()
        return expert_keys(config) | {
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.rank,
            "qk_nope_head_dim": config.head_width - latent.rotary_width,
            "qk_rope_head_dim": latent.rotary_width,
            "v_head_dim": latent.value_width,
            "num_key_value_heads": config.key_value_heads,
        }


KEYS = common.SIZES | EXPERT_KEYS | {"rope_theta": Key("rope_theta", float), "norm_epsilon": Key("rms_norm_eps", float)}
DERIVED_KEYS = LATENT_KEYS | {"intermediate_size", "n_shared_experts"}
DERIVED_NAMES = {
    "key_value_heads": "num_key_value_heads", "head_width": "qk_nope_head_dim", "latent": "kv_lora_rank",
    "feed_forward_width": "intermediate_size", "moe.shared_width": "n_shared_experts",
}  # fmt: skip
WITHOUT_HEADS = {path: tensor for path, tensor in common.TENSORS.items() if not path.endswith(("/key", "/value"))}
TENSORS = WITHOUT_HEADS | common.LATENT_TENSORS
DEFAULTS = common.DEFAULTS | {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
