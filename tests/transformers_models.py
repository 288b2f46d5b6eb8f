"""Tiny random models of transformers, made so that a wrong transpose or a skipped norm shows."""

from pathlib import Path
from typing import Any

import torch
import transformers

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / heads, so that the two cannot be mistaken for each other
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
MULTI_HEAD = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
SIZES_OF = {
    "llama": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": SIZES | EXPERTS,
    "gpt_neox": MULTI_HEAD | {"hidden_size": 64},  # 4 heads of 16, of which a quarter is 4
    "olmoe": MULTI_HEAD
    | {
        "num_key_value_heads": 2,
        "intermediate_size": 20,  # of each expert
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "eos_token_id": None,
        "pad_token_id": None,  # a padding token's embedding has no gradient in torch
    },
}


def tiny(kind: str, **changes: Any) -> Any:
    """A random model: weights of standard deviation 0.2, norm scales between 0.5 and 1.5."""
    config_class, model_class = CLASSES[kind]
    sizes = SIZES_OF[kind] | changes
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**sizes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.2)
    return model


def written(directory: Path, kind: str, max_shard_size: str = "50GB", **changes: Any) -> Any:
    """`tiny`, written to the directory by transformers."""
    model = tiny(kind, **changes)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def tensors_by_name(model: Any, gradients: bool = False) -> dict[str, Any]:
    """Numpy arrays by the name they have on disk; transformers fuses experts in memory."""
    found = {}
    for name, parameter in model.named_parameters():
        array = (parameter.grad if gradients else parameter.detach()).numpy()
        if name.endswith("experts.gate_up_proj"):
            gate, up = array[:, : array.shape[1] // 2], array[:, array.shape[1] // 2 :]
            found |= _experts(name.removesuffix("gate_up_proj"), "gate_proj", gate)
            found |= _experts(name.removesuffix("gate_up_proj"), "up_proj", up)
        elif name.endswith("experts.down_proj"):
            found |= _experts(name.removesuffix("down_proj"), "down_proj", array)
        elif name == "lm_head.weight" and isinstance(model, transformers.GPTNeoXForCausalLM):
            found["embed_out.weight"] = array
        else:
            found[name] = array
    return found


def _experts(prefix: str, projection: str, stacked: Any) -> dict[str, Any]:
    return {f"{prefix}{expert}.{projection}.weight": array for expert, array in enumerate(stacked)}
