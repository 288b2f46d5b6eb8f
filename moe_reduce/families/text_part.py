"""The language model within a multimodal one: its part of config.json, and the names of its tensors."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

TEXT = "text_config"  # key of the language model's part
OUTER = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
# Ways in which multimodal models name a tensor of their language model.
NAMES: tuple[Callable[[str], str], ...] = (
    lambda name: f"language_model.{name}",
    lambda name: f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name,
)


def config_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model; all of it if it is no multimodal model."""
    inner = raw.get(TEXT)
    if not isinstance(inner, Mapping):
        return dict(raw)
    outer = {key: raw[key] for key in OUTER if raw.get(key) is not None}
    return outer | {key: value for key, value in inner.items() if value is not None or key not in outer}


def renamed(names: Collection[str], expected: Collection[str], table: str) -> dict[str, str]:
    """Names of the language model alone -> names in files of a multimodal model; {} if the files hold no other part.

    expected: names of all tensors of the language model. table: that of the input embedding.
    """
    if table in names:
        return {}
    for name_of in NAMES:
        if name_of(table) in names:
            return {name: name_of(name) for name in expected if name_of(name) in names}
    return {}
