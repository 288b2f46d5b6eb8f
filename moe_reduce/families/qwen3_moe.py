"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with experts and a router in every layer."""

from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.families import common
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily
from moe_reduce.families.key import Key


class Qwen3MoE(HuggingFaceFamily):
    """The family, and a key that transformers requires although nothing reads it."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a new config.json, with `intermediate_size`, the width of dense layers, which it lacks."""
        raw = super().write(config)
        return raw | {"intermediate_size": raw["moe_intermediate_size"]}


FAMILY = Qwen3MoE(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    takes_unstated=True,
    keys=common.KEYS | common.HEAD_WIDTH | common.EXPERT_KEYS | {"moe.width": Key("moe_intermediate_size", int)},
    fixed={"qk_norm": True},
    defaults=common.DEFAULTS | {"max_position_embeddings": 32_768, "norm_topk_prob": False},
    accepted=common.ACCEPTED,
    constants=common.CONSTANTS | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    aliases=common.EXPERT_ALIASES,
    neutral=common.NO_WINDOW | {"intermediate_size"},  # the width of dense layers, which there are none of
    tensors=common.TENSORS | common.QK_NORM_TENSORS | common.EXPERT_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="qwen3moe",
        keys=common.gguf_expert_keys(),
        equal=common.GGUF_EQUAL,
        accepted=common.GGUF_EXPERT_ACCEPTED | {"expert_weights_norm": (True,)},
        constants={"norm_topk_prob": True},
        unread=frozenset({"feed_forward_length"}),
        tensors=common.GGUF_TENSORS | common.GGUF_QK_NORM_TENSORS | common.GGUF_EXPERT_TENSORS,
    ),
)
