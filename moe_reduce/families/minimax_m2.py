"""MiniMax-M2: sigmoid scores with a bias for the choice, norms over whole projections, a part of each head rotated."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import common, mixtral
from moe_reduce.families.huggingface import ROPE, HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor

SHARE, WIDTH = "partial_rotary_factor", "rotary_dim"  # of newer and published files
LAYERS = "attn_type_list"  # 1 for each layer with softmax attention


class MiniMaxM2(HuggingFaceFamily):
    """The family, whose published files state how many channels of a head are rotated."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The rotated share of a head; UserError for a layer with another attention."""
        types = flat.get(LAYERS)
        if types is not None and types != [1] * flat["num_hidden_layers"]:
            raise UserError(f"{LAYERS}={types!r} is not supported, only 1 for each layer")
        width = Key(WIDTH, int, optional=True).value(flat)
        if SHARE not in flat:
            return {"rotary_share": 1.0 if width is None else width / flat["head_dim"]}
        share = Key(SHARE, float).value(flat)
        if width is not None and width != share * flat["head_dim"]:
            given = f"{WIDTH}={width!r} and {SHARE}={share!r} contradict each other"
            raise UserError(f"{given} for head_dim={flat['head_dim']!r}: keep one")
        return {"rotary_share": share}

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """The rotated share of a head."""
        return {SHARE: config.rotary_share, WIDTH: int(config.rotary_share * config.head_width)}


FAMILY = MiniMaxM2(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    keys=common.KEYS | common.HEAD_WIDTH | mixtral.EXPERT_KEYS,
    fixed={
        "qk_norm": True,
        "qk_norm_scope": "projection",
        "moe.score_function": "sigmoid",
        "moe.selection_bias": True,
        "moe.bias_on": "scores_of_choice",
        "moe.normalize": True,
    },
    derived_keys=frozenset({SHARE, WIDTH, LAYERS}),
    defaults=common.DEFAULTS
    | {
        "max_position_embeddings": 196_608,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5e6,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    accepted=common.ACCEPTED
    | {
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0, None),
        "sliding_window": (None,),
        "layernorm_full_attention_beta": (1.0,),
        "layernorm_linear_attention_beta": (1.0,),
        "layernorm_mlp_beta": (1.0,),
    },
    constants={"hidden_act": "silu"},
    rope={**ROPE, SHARE: SHARE},
    aliases=mixtral.ALIASES,
    neutral=mixtral.NEUTRAL
    | common.NEXT_TOKENS
    | {"max_model_len", "mlp_intermediate_size", "shared_moe_mode"},  # of layers that it lacks
    tensors=common.TENSORS
    | common.QK_NORM_TENSORS
    | mixtral.EXPERT_TENSORS
    | {"layers/router_bias": Tensor(f"{mixtral.BLOCK}.e_score_correction_bias")},
    ignored=common.IGNORED,
    next_tokens=True,
)
