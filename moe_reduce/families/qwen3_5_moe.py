"""Language models of Qwen3.5 and Qwen3.6 with experts: Qwen3-Next with a matrix for each input of linear attention.

They are published within multimodal models (text_part.py), whose files hold the experts of a layer as one tensor.
"""

from moe_reduce.families import common, delta_net
from moe_reduce.families.common import EXPERT, LAYER
from moe_reduce.families.delta_net import DeltaNet

FAMILY = DeltaNet(
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    keys=delta_net.KEYS,
    fixed=delta_net.FIXED | {"moe.normalize": True},
    derived_keys=delta_net.DERIVED_KEYS,
    derived_names=delta_net.DERIVED_NAMES,
    defaults=delta_net.DEFAULTS | {"num_experts": 256, "num_experts_per_tok": 8},
    accepted=common.ACCEPTED | {"attn_output_gate": (True,), "norm_topk_prob": (True,), "output_gate_type": ("swish",)},
    constants={"hidden_act": "silu"},
    rope=delta_net.ROTARY,
    # which of three coordinates turns a channel; those of a text are equal
    neutral_rope=frozenset({"mrope_interleaved", "mrope_section"}),
    aliases=common.EXPERT_ALIASES,
    neutral=common.NEXT_TOKENS
    | {"intermediate_size", "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"},
    tensors=delta_net.TENSORS | delta_net.SEPARATE_TENSORS,
    fused={
        f"{LAYER}.mlp.experts.gate_up_proj": (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
        f"{LAYER}.mlp.experts.down_proj": (f"{EXPERT}.down_proj.weight",),
    },
    ignored=common.IGNORED,
    next_tokens=True,
)
