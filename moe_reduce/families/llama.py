"""LLaMA (arXiv:2302.13971): dense, SwiGLU, RMSNorm, rotary embedding, optionally grouped heads."""

from moe_reduce.families import common
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily

FAMILY = HuggingFaceFamily(
    name="llama",
    architecture="LlamaForCausalLM",
    takes_unstated=True,
    keys=common.KEYS | common.HEAD_WIDTH | common.DENSE_KEYS,
    defaults=common.DEFAULTS | {"max_position_embeddings": 2048},
    accepted=common.ACCEPTED,
    constants=common.CONSTANTS,
    tensors=common.TENSORS | common.DENSE_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="llama",
        keys=common.GGUF_KEYS | common.GGUF_DENSE_KEYS,
        equal=common.GGUF_EQUAL,
        accepted=common.GGUF_ACCEPTED,
        tensors=common.GGUF_TENSORS | common.GGUF_DENSE_TENSORS | common.GGUF_NEIGHBOURS,
    ),
)
