"""Qwen2 and Qwen2.5, dense (arXiv:2407.10671): LLaMA with biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.families import common, windows
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.huggingface import HuggingFaceFamily

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "layer_types"})
UNREAD = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})  # where no layer has a window


class Qwen2(HuggingFaceFamily):
    """The family, whose later layers may have a sliding window."""

    def derive(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the sliding window."""
        layers, first = flat["num_hidden_layers"], flat["max_window_layers"]
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
        return window_fields(flat, types) | head_field(flat)

    def derived(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of the sliding window."""
        return window_keys(config) | head_key(config)


def head_field(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Width of a head, which files state only if it is not width / heads."""
    return {"head_width": common.HEAD_WIDTH["head_width"].value(flat)}


def head_key(config: ModelConfig) -> dict[str, Any]:
    """Key of the width of a head, if it is stated."""
    return {} if config.head_width * config.query_heads == config.width else {"head_dim": config.head_width}


def window_fields(flat: Mapping[str, Any], types: list[str]) -> dict[str, Any]:
    """Fields of the sliding window of a Qwen2 model. types: of the layers, where a file does not state them."""
    given = flat.get("layer_types") or (types if flat["use_sliding_window"] else ["full_attention"] * len(types))
    window = flat["sliding_window"] if flat["use_sliding_window"] else None
    return windows.read(window, given, flat["num_hidden_layers"])


def window_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of the sliding window of a Qwen2 model; without one, a file keeps the width that nothing reads."""
    keys: dict[str, Any] = {
        "use_sliding_window": config.sliding_window is not None, "layer_types": windows.types_of(config),
    }  # fmt: skip
    return keys if config.sliding_window is None else keys | {"sliding_window": config.sliding_window}


FAMILY = Qwen2(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=common.KEYS | common.DENSE_KEYS,
    fixed={"attention_biases": "inputs"},
    derived_keys=WINDOW_KEYS | {"head_dim"},
    derived_names={"head_width": "head_dim"},
    defaults=common.DEFAULTS
    | {
        "max_position_embeddings": 32_768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    accepted=common.ACCEPTED,
    constants={"hidden_act": "silu"},
    neutral=UNREAD,
    tensors=common.TENSORS | common.INPUT_BIAS_TENSORS | common.DENSE_TENSORS,
    ignored=common.IGNORED,
    gguf=Gguf(
        architecture="qwen2",
        keys=common.GGUF_KEYS | common.GGUF_DENSE_KEYS,
        equal=common.GGUF_EQUAL,
        accepted=common.GGUF_ACCEPTED,
        tensors=common.GGUF_TENSORS | common.GGUF_DENSE_TENSORS | common.GGUF_INPUT_BIAS_TENSORS,
    ),
)
