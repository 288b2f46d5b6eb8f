"""Small GGUF files, written by the library's own writer as llama.cpp's converter lays a Llama out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers_models import tiny

ALPHABET = sorted(ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "a n"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TYPES = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_attention_heads": 8,  # not hidden_size / head_dim
    "rope_theta": 50_000.0,
    "rms_norm_eps": 1e-5,
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
BYTE_LEVEL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [int(kind) for kind in TYPES],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}


def stored(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """Values of a matrix that a file of this kind holds; vectors, which are norms, stay fp32."""
    return weight if weight.ndim == 1 else gguf.dequantize(gguf.quantize(weight, kind), kind)


def metadata(config: Any) -> dict[str, Any]:
    """Keys of the architecture, as llama.cpp's converter writes them."""
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }


def write_llama(
    path: Path, kind: Kind = Kind.F32, changes: Mapping[str, Any] | None = None, **sizes: Any
) -> dict[str, np.ndarray]:
    """Write a random Llama; return its weights, not quantised, by the names that transformers gives them.

    changes: keys of the metadata to set, or with None to leave out. sizes: changes of SIZES.
    """
    model = tiny("llama", **SIZES | sizes)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    architecture = (changes or {}).get("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    keys = metadata(model.config) | BYTE_LEVEL | dict(changes or {})
    for key, value in keys.items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    for name, weight in weights.items():
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        found = [count for part, count in heads.items() if part in name]
        _add_tensor(writer, _name(name), _neighbours(weight, found[0]) if found else weight, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: Kind) -> None:
    if weight.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(name, weight)
    else:
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)


def _name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name


def _neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered, so that those that are rotated together are neighbours, as llama.cpp has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
