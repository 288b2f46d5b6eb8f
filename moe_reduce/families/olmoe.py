"""OLMoE (arXiv:2409.02060): experts in every layer, RMSNorm over all query heads together, and over all key heads."""

from moe_reduce.families import common
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key

FAMILY = HuggingFaceFamily(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    takes_unstated=True,
    keys=common.KEYS
    | common.EXPERT_KEYS
    | {"moe.width": Key("intermediate_size", int), "clip_qkv": Key("clip_qkv", float, optional=True)},
    fixed={"qk_norm": True, "qk_norm_scope": "projection"},
    defaults=common.DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "norm_topk_prob": False},
    accepted=common.ACCEPTED | {"head_dim": (None,)},
    constants=common.CONSTANTS,
    aliases=common.EXPERT_ALIASES,
    tensors=common.TENSORS | common.QK_NORM_TENSORS | common.EXPERT_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="olmoe",
        # llama.cpp takes the norm of keys to be as wide as that of queries
        keys={
            name: key
            for name, key in common.gguf_expert_keys(width="intermediate_size").items()
            if name != "num_key_value_heads"
        },
        equal=common.GGUF_EQUAL | {"attention.head_count_kv": "num_attention_heads"},
        accepted=common.GGUF_EXPERT_ACCEPTED | {"expert_weights_norm": (False,)},
        constants={"norm_topk_prob": False},
        unstated=frozenset({"head_dim"}),
        tensors=common.GGUF_TENSORS | common.GGUF_QK_NORM_TENSORS | common.GGUF_EXPERT_TENSORS,
    ),
)
