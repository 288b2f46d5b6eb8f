"""Mixtral (arXiv:2401.04088): Mistral with a few wide experts in every layer."""

from moe_reduce.families import common
from moe_reduce.families.common import LAYER
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor
from moe_reduce.families.mistral import WINDOW

BLOCK = f"{LAYER}.block_sparse_moe"
EXPERT_KEYS = {
    "moe.experts": Key("num_local_experts", int),
    "moe.active": Key("num_experts_per_tok", int),
    "moe.width": Key("intermediate_size", int),
}
ALIASES = {"num_experts": "num_local_experts"}
EXPERT_TENSORS = {
    "layers/experts/gate": Tensor(f"{BLOCK}.experts.{{expert}}.w1.weight"),
    "layers/experts/up": Tensor(f"{BLOCK}.experts.{{expert}}.w3.weight"),
    "layers/experts/down": Tensor(f"{BLOCK}.experts.{{expert}}.w2.weight"),
    "layers/router/weight": Tensor(f"{BLOCK}.gate.weight"),
}
NEUTRAL = frozenset({"router_jitter_noise"})  # noise of the inputs while training

FAMILY = HuggingFaceFamily(
    name="mixtral",
    architecture="MixtralForCausalLM",
    keys=common.KEYS | common.HEAD_WIDTH | EXPERT_KEYS | WINDOW,
    fixed={"moe.normalize": True},
    defaults=common.DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    accepted=common.ACCEPTED,
    constants={"hidden_act": "silu"},
    aliases=ALIASES,
    neutral=NEUTRAL,
    tensors=common.TENSORS | EXPERT_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="llama",  # with experts
        keys=common.gguf_expert_keys("num_local_experts", "intermediate_size"),
        equal=common.GGUF_EQUAL,
        accepted=common.GGUF_EXPERT_ACCEPTED | {"expert_weights_norm": (True,)},
        tensors=common.GGUF_TENSORS | common.GGUF_EXPERT_TENSORS | common.GGUF_NEIGHBOURS,
    ),
)
