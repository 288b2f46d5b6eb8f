"""Configurations as published: each builds abstractly with the number of parameters that is known of its files.

SOURCES says where each number is from. No weights were opened for this: an index (`model.safetensors.index.json`)
states the bytes of all tensors, two for each parameter; the others are what the hub, GGUF files or readers of headers
count.
"""

import math
from typing import Any

import pytest
import torch
import transformers

from moe_reduce.core import trees
from moe_reduce.families import from_hf, of_config, parameter_layouts
from moe_reduce.models.parameters import abstract_params, parameter_count

COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0}
QWEN = COMMON | {"rms_norm_eps": 1e-6, "use_sliding_window": False, "bos_token_id": 151643}
DEEPSEEK = COMMON | {
    "attention_bias": False, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "tie_word_embeddings": False, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "bos_token_id": 100000, "aux_loss_alpha": 0.001,
    "seq_aux": True, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
}  # fmt: skip
DEEPSEEK_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "num_nextn_predict_layers": 1}
OSS = COMMON | {
    "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
    "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_key_value_heads": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-5, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
}  # fmt: skip
DELTA_NET = COMMON | {
    "attention_bias": False, "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
    "moe_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def oss(layers: int, experts: int) -> dict[str, Any]:
    types = ["sliding_attention", "full_attention"] * (layers // 2)
    return OSS | {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": types}


# name -> (config.json without what concerns quantisation of the weights, number of parameters, context)
# None: counted by transformers, which makes the model without values
PUBLISHED: dict[str, tuple[dict[str, Any], int | None, int]] = {
    "Qwen/Qwen2.5-0.5B": (
        QWEN
        | {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False,
            "vocab_size": 151936,
        },
        494_032_768, 32_768,
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        QWEN
        | {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
            "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        7_615_616_512, 131_072,
    ),
    "meta-llama/Llama-3.1-8B": (
        COMMON
        | {
            "model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
        },
        8_030_261_248, 131_072,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        COMMON
        | {
            "model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_size": 576,
            "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
        134_515_008, 8192,
    ),
    "mistralai/Mistral-7B-v0.1": (
        COMMON
        | {
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        7_241_732_096, 32_768,
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        COMMON
        | {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        46_702_792_704, 32_768,
    ),
    "mistralai/Mixtral-8x22B-v0.1": (
        COMMON
        | {
            "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384,
            "max_position_embeddings": 65536, "num_attention_heads": 48, "num_experts_per_tok": 2,
            "num_hidden_layers": 56, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000, "router_aux_loss_coef": 0.001, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        140_620_634_112, 65_536,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        QWEN
        | {
            "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
            "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
            "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
            "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768, "tie_word_embeddings": False, "vocab_size": 151936,
        },
        14_315_784_192, 8192,
    ),
    "Qwen/Qwen3-30B-A3B": (
        QWEN
        | {
            "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
            "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
            "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        30_532_122_624, 40_960,
    ),
    "allenai/OLMoE-1B-7B-0924": (
        COMMON
        | {
            "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
            "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_scaling": None,
            "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
        },
        6_919_161_856, 4096,
    ),
    "openai/gpt-oss-20b": (oss(24, 32), 20_914_757_184, 131_072),
    "openai/gpt-oss-120b": (oss(36, 128), 116_829_156_672, 131_072),
    "deepseek-ai/DeepSeek-V2-Lite": (
        DEEPSEEK
        | {
            "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
            "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
            "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
            "num_key_value_heads": 16, "q_lora_rank": None, "rope_scaling": DEEPSEEK_YARN,
            "routed_scaling_factor": 1.0, "topk_group": 1,
        },
        15_706_484_224, 163_840,
    ),
    "deepseek-ai/DeepSeek-V2": (
        DEEPSEEK
        | {
            "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 5120, "intermediate_size": 12288,
            "max_position_embeddings": 163840, "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160,
            "n_shared_experts": 2, "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60,
            "num_key_value_heads": 128, "q_lora_rank": 1536, "rope_scaling": DEEPSEEK_YARN,
            "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
        },
        235_741_434_880, 163_840,
    ),
    "deepseek-ai/DeepSeek-V3": (
        DEEPSEEK
        | NOAUX
        | {
            "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
            "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "topk_group": 4,
            "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "vocab_size": 129280,
        },
        671_026_419_200, 163_840,
    ),
    "moonshotai/Moonlight-16B-A3B": (
        DEEPSEEK
        | NOAUX
        | {
            "model_type": "deepseek_v3", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264,
            "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
            "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
            "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 2.446, "topk_group": 1,
            "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "vocab_size": 163840, "num_nextn_predict_layers": 0,
        },
        None, 8192,
    ),
    "zai-org/GLM-4.5-Air": (
        COMMON
        | {
            "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
            "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
        },
        106_852_251_264, 131_072,
    ),
    "MiniMaxAI/MiniMax-M2": (
        COMMON
        | {
            "model_type": "minimax_m2", "attn_type_list": [1] * 62, "head_dim": 128, "hidden_size": 3072,
            "intermediate_size": 1536, "max_position_embeddings": 196608, "mtp_transformer_layers": 1,
            "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
            "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-6,
            "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
            "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True,
            "vocab_size": 200064,
        },
        228_689_764_864, 196_608,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        DELTA_NET
        | {
            "model_type": "qwen3_next", "decoder_sparse_step": 1, "intermediate_size": 5120, "mlp_only_layers": [],
            "norm_topk_prob": True, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
            "output_router_logits": False, "rope_scaling": None, "rope_theta": 10000000,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        79_674_391_296, 262_144,
    ),
    "Qwen/Qwen3.5-35B-A3B": (
        DELTA_NET
        | {
            "model_type": "qwen3_5_moe_text", "attn_output_gate": True, "mamba_ssm_dtype": "float32",
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10, "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False, "num_experts": 256, "num_experts_per_tok": 8,
            "num_hidden_layers": 40, "pad_token_id": None, "vocab_size": 248320,
            "rope_parameters": {
                "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                "rope_theta": 10000000, "rope_type": "default",
            },
        },
        34_660_610_688, 262_144,
    ),
}  # fmt: skip
SOURCES = {
    "Qwen/Qwen2.5-0.5B": "sum over the headers of its file",
    "Qwen/Qwen2.5-7B-Instruct": "index, 15,231,233,024 bytes",
    "meta-llama/Llama-3.1-8B": "index, 16,060,522,496 bytes",
    "HuggingFaceTB/SmolLM2-135M": "the hub's count, 269,030,016 bytes in bfloat16",
    "mistralai/Mistral-7B-v0.1": "index, 14,483,464,192 bytes",
    "mistralai/Mixtral-8x7B-v0.1": "index, 93,405,585,408 bytes",
    "mistralai/Mixtral-8x22B-v0.1": "sum over the headers of its 59 files, 281,241,268,224 bytes",
    "Qwen/Qwen1.5-MoE-A2.7B": "index, 28,631,568,384 bytes",
    "Qwen/Qwen3-30B-A3B": "index, 61,064,245,248 bytes",
    "allenai/OLMoE-1B-7B-0924": "sum over the headers of its files",
    "openai/gpt-oss-20b": "general.parameter_count of its GGUF file",
    "openai/gpt-oss-120b": "general.parameter_count of its GGUF file",
    "deepseek-ai/DeepSeek-V2-Lite": "index, 31,412,968,448 bytes",
    "deepseek-ai/DeepSeek-V2": "the hub's count",
    "deepseek-ai/DeepSeek-V3": "sum over the headers of its files, without scales and MTP layer",
    "moonshotai/Moonlight-16B-A3B": "counted by transformers; the card says 16B",
    "zai-org/GLM-4.5-Air": "the hub's count of its fine-tuning INTELLECT-3, which lacks the MTP layer",
    "MiniMaxAI/MiniMax-M2": "general.parameter_count of GGUF files; the hub's count",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "index, 162,649,725,440 bytes, less 1,650,471,424 parameters of MTP layers",
    "Qwen/Qwen3.5-35B-A3B": "general.parameter_count of GGUF files; 35,951,822,704 in all, less 844,640,768 of MTP"
    " layers and 446,571,248 of the vision tower",
}


def counted(raw: dict[str, Any]) -> int:
    """Number of values that transformers would save: parameters, and the biases of routers, which are buffers."""
    raw = {key: value for key, value in raw.items() if key != "attn_type_list"}
    theirs = transformers.CONFIG_MAPPING[raw["model_type"]](**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    return sum(values.numel() for values in (*model.parameters(), *biases))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_parameters_of_its_files(name: str):
    assert SOURCES[name]
    raw, parameters, context = PUBLISHED[name]
    config = from_hf(raw)
    assert of_config(config).name == raw["model_type"]
    if parameters is None:
        parameters = counted(raw)
    assert parameter_count(config) == parameters
    assert sum(math.prod(leaf.shape) for leaf in trees.flatten(abstract_params(config)).values()) == parameters
    assert len(parameter_layouts(config)) > 10
    assert config.context == context
