"""Qwen3-Next: Gated DeltaNet in three layers of four, many small experts, and a block beside them."""

from moe_reduce.families import common, delta_net
from moe_reduce.families.delta_net import DeltaNet

FAMILY = DeltaNet(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    keys=delta_net.KEYS | {"moe.normalize": common.EXPERT_KEYS["moe.normalize"]},
    fixed=delta_net.FIXED,
    derived_keys=delta_net.DERIVED_KEYS,
    derived_names=delta_net.DERIVED_NAMES,
    defaults=delta_net.DEFAULTS | {"norm_topk_prob": True, "num_experts": 512, "num_experts_per_tok": 10},
    accepted=common.ACCEPTED,
    constants={"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []},
    rope=delta_net.ROTARY,
    aliases=common.EXPERT_ALIASES,
    neutral=common.NO_WINDOW | common.NEXT_TOKENS | {"intermediate_size"},  # the width of dense layers, none here
    tensors=delta_net.TENSORS | delta_net.JOINED_TENSORS,
    ignored=common.IGNORED,
    next_tokens=True,
)
