"""Interface of a family: the spelling of one architecture's config.json, and the names of its tensors."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_reduce.core.config import ModelConfig
from moe_reduce.data.tokenizer_files import READ_AS
from moe_reduce.families.gguf import Gguf
from moe_reduce.families.layout import Tensor

# Keys that describe the tokenizer and the weights rather than the architecture: they survive a change of family.
CARRIED = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", READ_AS, "torch_dtype", "transformers_version")
NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """One architecture on disk.

    name: `model_type` in config.json. architecture: the class that config.json names. tensors: layout by path of the
    parameter. ignored: names of constants that old checkpoints store and nothing reads. takes_unstated: whether a
    config that states no family, such as that of a fresh training run, may be written as this one. False for a family
    that is added later, so that an old config is always written as it was before. gguf: its form in GGUF files, if
    those are read. next_tokens: whether files may hold layers that predict several tokens at once. fused: name of a
    tensor [experts, outputs, inputs] that files may hold in place of the tensors of each expert -> names of these,
    whose outputs follow one another in it.
    """

    name: str
    architecture: str
    tensors: Mapping[str, Tensor]
    ignored: re.Pattern[str] = NOTHING
    takes_unstated: bool = False
    gguf: Gguf | None = None
    next_tokens: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def leaves_out(self, name: str, config: ModelConfig) -> bool:
        """True for a tensor of a part that nothing here computes: layers that predict several tokens at once."""
        if not self.next_tokens:
            return False
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return bool(re.match(r"(model\.)?mtp", name)) or (layer is not None and int(layer[1]) >= config.layers)

    @property
    def input_table(self) -> str:
        """Name of the tensor of the input embedding."""
        return self.tensors["embedding/table"].name

    @property
    def output_table(self) -> str:
        """Name of the tensor of the output embedding, which files with tied embeddings leave out."""
        return self.tensors["unembedding/table"].name

    @abstractmethod
    def read(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json of this family; UserError names a key that cannot be represented."""

    def key_of(self, field: str) -> str:
        """Key of config.json that gives a field of ModelConfig, or of MoEConfig with "moe." in front."""
        return field

    @abstractmethod
    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a new config.json that describe the architecture."""

    @abstractmethod
    def update(self, raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """A config.json of this family with the keys of changed fields replaced; all other keys stay as they are."""

    @abstractmethod
    def represents(self, config: ModelConfig) -> bool:
        """True if a config.json of this family describes the config exactly."""

    @abstractmethod
    def same(self, left: ModelConfig, right: ModelConfig) -> bool:
        """True if two configs of this family have the same config.json."""
