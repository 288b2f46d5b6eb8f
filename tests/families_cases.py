"""Tiny random models of families, two configurations of each that differ in every quirk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0}
MLA = SIZES | {
    "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1, "moe_intermediate_size": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}  # fmt: skip
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
DELTA_NET = SIZES | {
    "num_hidden_layers": 3, "head_dim": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 12, "num_experts": 6,
    "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
IN_TURN = {
    "num_hidden_layers": 4, "layer_types": ["full_attention", "linear_attention"] * 2, "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 2, "attention_bias": True, "tie_word_embeddings": True,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": (
        SIZES | {"rope_parameters": LLAMA3},
        SIZES
        | {
            "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
            "rope_parameters": DYNAMIC, "rms_norm_eps": 1e-2,
        },
    ),
    "mistral": (
        SIZES | {"sliding_window": None, "head_dim": 8, "rope_parameters": YARN},
        SIZES | {"sliding_window": 5, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "mixtral": (
        SIZES | EXPERTS | {"head_dim": 8, "rms_norm_eps": 1e-2},
        SIZES | EXPERTS | {"sliding_window": 5, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "qwen2_moe": (
        SIZES | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                 "shared_expert_intermediate_size": 16},
        SIZES
        | {
            "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True,
            "shared_expert_intermediate_size": 8, "qkv_bias": False, "use_sliding_window": True, "sliding_window": 5,
            "max_window_layers": 2, "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        SIZES | EXPERTS | {"sliding_window": 5, "rope_parameters": YARN | {"truncate": False}},
        SIZES
        | EXPERTS
        | {
            "head_dim": 8, "layer_types": ["full_attention"] * 2, "swiglu_limit": 0.5, "swiglu_alpha": 2.0,
            "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "glm4_moe": (
        SIZES | {
            "head_dim": 8, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
            "attention_bias": True, "routed_scaling_factor": 1.7,
        },
        SIZES
        | {
            "num_hidden_layers": 3, "first_k_dense_replace": 2, "head_dim": 8, "moe_intermediate_size": 12,
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 2,
            "norm_topk_prob": False, "use_qk_norm": True, "partial_rotary_factor": 1.0, "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": (
        MLA | {"q_lora_rank": 14, "n_group": 2, "topk_group": 1, "rope_parameters": MSCALE},
        MLA
        | {
            "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False,
            "n_shared_experts": 2, "first_k_dense_replace": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-2,
        },
    ),
    "deepseek_v2": (
        MLA | {"q_lora_rank": None, "rope_parameters": MSCALE},
        MLA
        | {
            "q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 3.0, "first_k_dense_replace": 0, "tie_word_embeddings": True,
        },
    ),
    "minimax_m2": (
        SIZES | EXPERTS | {"head_dim": 8, "rotary_dim": 4},
        SIZES | EXPERTS | {"head_dim": 8, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    ),
    "qwen3_next": (
        DELTA_NET | {"partial_rotary_factor": 0.5},
        DELTA_NET
        | IN_TURN
        | {"norm_topk_prob": False, "rms_norm_eps": 1e-2, "rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}},
    ),
    "qwen3_5_moe_text": (
        DELTA_NET | {"rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_interleaved": True,
            "mrope_section": [1, 1, 0],
        }},
        DELTA_NET | IN_TURN | {"rms_norm_eps": 1e-2, "num_experts_per_tok": 3, "linear_conv_kernel_dim": 3},
    ),
}  # fmt: skip
CENTRED = ("qwen3_next", "qwen3_5_moe_text")  # norms store a scale's difference from 1
KINDS = [(kind, number) for kind in CASES for number in range(2)]


def config_class(kind: str) -> Any:
    """The class of a family's configurations in transformers."""
    return transformers.CONFIG_MAPPING[kind]


def config_of(kind: str, number: int, **changes: Any) -> Any:
    """The configuration of transformers of a case."""
    return transformers.AutoConfig.for_model(kind, **CASES[kind][number] | changes)


def tiny(kind: str, number: int, **changes: Any) -> Any:
    """A random model: weights of standard deviation 0.2, norm scales between 0.5 and 1.5, other biases than 0."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(kind, number, **changes), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                if kind in CENTRED and "linear_attn" not in name:
                    parameter.sub_(1.0)
            elif "inv_freq" not in name:
                parameter.normal_(0.0, 0.2)
    return model


def written(directory: Path, kind: str, number: int, **changes: Any) -> Any:
    """`tiny`, written to the directory by transformers."""
    model = tiny(kind, number, **changes)
    model.save_pretrained(directory)
    return model


def tokens(rows: int = 5, time: int = 14, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, time), dtype=np.int32)
