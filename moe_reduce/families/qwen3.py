"""Qwen3, dense (arXiv:2505.09388): LLaMA with an RMSNorm of each query and key head."""

from moe_reduce.families import common
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily

FAMILY = HuggingFaceFamily(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    takes_unstated=True,
    keys=common.KEYS | common.HEAD_WIDTH | common.DENSE_KEYS,
    fixed={"qk_norm": True},
    defaults=common.DEFAULTS | {"max_position_embeddings": 32_768, "head_dim": 128},
    accepted=common.ACCEPTED,
    constants=common.CONSTANTS,
    neutral=common.NO_WINDOW,
    tensors=common.TENSORS | common.QK_NORM_TENSORS | common.DENSE_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="qwen3",
        keys=common.GGUF_KEYS | common.GGUF_DENSE_KEYS,
        equal=common.GGUF_EQUAL,
        accepted=common.GGUF_ACCEPTED,
        tensors=common.GGUF_TENSORS | common.GGUF_DENSE_TENSORS | common.GGUF_QK_NORM_TENSORS,
    ),
)
