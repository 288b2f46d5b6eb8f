"""Form of a family in GGUF files: metadata as keys of config.json, and names of tensors.

The container is read by core/gguf_file.py, the values of its tensors by storage/gguf.py.
"""

import dataclasses
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from moe_reduce.core.errors import UserError
from moe_reduce.core.gguf_file import GgufFile
from moe_reduce.families.key import Key
from moe_reduce.families.layout import Tensor

TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
EXPERTS = "expert_count"  # key of the number of experts, after the name of the architecture
END_OF_TURN = "tokenizer.ggml.eot_token_id"


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """One architecture of llama.cpp.

    architecture: `general.architecture`, and the prefix of the keys below. keys: key of config.json -> key of the
    metadata. equal: further keys of the metadata -> the key of config.json that has the same value. accepted: further
    keys that change what a model computes, with the only values that the decoder computes. constants: keys of
    config.json that llama.cpp takes for granted. unread: further keys that change nothing. unstated: those of `keys`
    that the family's config.json has no place for. tensors: layout by path of the parameter.
    """

    architecture: str
    keys: Mapping[str, Key]
    equal: Mapping[str, str]
    accepted: Mapping[str, tuple[Any, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    unread: Set[str] = frozenset()
    unstated: Set[str] = frozenset()
    tensors: Mapping[str, Tensor]

    @property
    def has_experts(self) -> bool:
        """True if the files are mixtures of experts."""
        return any(key.name == EXPERTS for key in self.keys.values())

    def read(self, file: GgufFile) -> dict[str, Any]:
        """Keys of a config.json for a file; UserError names a key that is missing, unknown or not supported."""
        raw = self.described(file.metadata) | {"vocab_size": self._rows(file)}
        raw |= {"tie_word_embeddings": not self._has_output(file), "dtype": "float32"}
        prefix = f"{self.architecture}."
        known = {prefix + name for name in (*(key.name for key in self.keys.values()), *self.unread)}
        for key, value in file.metadata.items():
            if key.startswith(prefix) and key not in known:
                self._check(key, value, raw)
        return self.in_config(raw) | _token_ids(file.metadata)

    def described(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a config.json that the metadata of a file give, without those that its tensors give."""
        prefix = f"{self.architecture}."
        keys = {name: dataclasses.replace(key, name=prefix + key.name) for name, key in self.keys.items()}
        found = {name: key.value(metadata) for name, key in keys.items()}
        raw = {name: value for name, value in found.items() if value is not None}
        raw.setdefault("head_dim", raw["hidden_size"] // max(raw["num_attention_heads"], 1))
        return raw | dict(self.constants)

    def in_config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The keys among these that a config.json of the family may have."""
        return {key: value for key, value in raw.items() if key not in self.unstated}

    def write(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of a file, from the keys of a config.json in the spelling of published files."""
        found = {key.name: values[name] for name, key in self.keys.items() if values.get(name) is not None}
        found |= {name: values[key] for name, key in self.equal.items()}
        return {f"{self.architecture}.{name}": value for name, value in found.items()}

    def _check(self, key: str, value: Any, raw: Mapping[str, Any]) -> None:
        """Raise UserError for a key of the metadata that says what the decoder does not compute."""
        name = key.removeprefix(f"{self.architecture}.")
        accepted = (raw[self.equal[name]],) if name in self.equal else self.accepted.get(name)
        if accepted is None:
            raise UserError(f"{key}={value!r} is not known: it may change what the model computes")
        if value not in accepted:
            raise UserError(f"{key}={value!r} is not supported, only {accepted[0]!r}")

    def _rows(self, file: GgufFile) -> int:
        name = self.tensors["embedding/table"].name
        if name not in file.tensors:
            raise UserError(f"tensor {name} is missing: fetch the file again")
        return file.tensors[name].shape[0]

    def _has_output(self, file: GgufFile) -> bool:
        return self.tensors["unembedding/table"].name in file.tensors


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens; several that end a text where a chat ends its turns with another than its documents."""
    ids = {name: metadata[key] for name, key in TOKEN_IDS.items() if key in metadata}
    turn = metadata.get(END_OF_TURN)
    if turn is not None and ids.get("eos_token_id", turn) != turn:
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return ids
