"""DeepSeek-V3 (arXiv:2412.19437), Kimi-K2 and Moonlight: latent attention, sigmoid scores, groups of experts."""

from moe_reduce.families import common, deepseek
from moe_reduce.families.deepseek import DeepSeek
from moe_reduce.families.key import Key

FAMILY = DeepSeek(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=deepseek.KEYS
    | {
        "rotary_interleaved": Key("rope_interleave", bool),
        "moe.normalize": Key("norm_topk_prob", bool),
        "moe.groups": Key("n_group", int),
        "moe.active_groups": Key("topk_group", int),
    },
    fixed=deepseek.SIGMOID,
    derived_keys=deepseek.DERIVED_KEYS,
    derived_names=deepseek.DERIVED_NAMES,
    defaults=deepseek.DEFAULTS
    | {
        "max_position_embeddings": 4096,
        "rope_interleave": True,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    },
    accepted=common.ACCEPTED | deepseek.ACCEPTED | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    constants=common.CONSTANTS,
    aliases={"num_local_experts": "n_routed_experts"},
    neutral=deepseek.NEUTRAL,
    tensors=deepseek.TENSORS
    | deepseek.EXPERT_TENSORS
    | common.of_dense_layers(deepseek.TENSORS | common.DENSE_TENSORS),
    ignored=common.IGNORED,
    next_tokens=True,
)
