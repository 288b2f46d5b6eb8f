"""Parameter leaves <-> tensors under their Hugging Face names: one table read in both directions.

A tensor name with {layer} and {expert} stands for as many tensors, stacked on the first axes of the leaf. Axes are
written in the letters of moe_reduce.models; "HC D" is a matrix whose rows are heads times head width, so the table
also says how a tensor is reshaped and transposed. Rotary halves follow Hugging Face: no permutation.
"""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np

from moe_reduce import trees
from moe_reduce.config import ModelConfig
from moe_reduce.models.decoder import abstract_params

LAYER = "model.layers.{layer}"
TABLE = {  # path of the leaf -> (tensor name, axes on disk, axes of the leaf behind the stacked ones)
    "embedding/table": ("model.embed_tokens.weight", "V D", "VD"),
    "embedding/factor": ("model.embed_tokens.factor", "V K", "VK"),
    "embedding/projection": ("model.embed_tokens.projection", "K D", "KD"),
    "unembedding/table": ("lm_head.weight", "V D", "VD"),
    "final_norm/scale": ("model.norm.weight", "D", "D"),
    "layers/attention_norm/scale": (f"{LAYER}.input_layernorm.weight", "D", "D"),
    "layers/mlp_norm/scale": (f"{LAYER}.post_attention_layernorm.weight", "D", "D"),
    "layers/attention/query": (f"{LAYER}.self_attn.q_proj.weight", "HC D", "DHC"),
    "layers/attention/key": (f"{LAYER}.self_attn.k_proj.weight", "GC D", "DGC"),
    "layers/attention/value": (f"{LAYER}.self_attn.v_proj.weight", "GC D", "DGC"),
    "layers/attention/output": (f"{LAYER}.self_attn.o_proj.weight", "D HC", "HCD"),
    "layers/attention/query_norm/scale": (f"{LAYER}.self_attn.q_norm.weight", "C", "C"),
    "layers/attention/key_norm/scale": (f"{LAYER}.self_attn.k_norm.weight", "C", "C"),
    "layers/mlp/gate": (f"{LAYER}.mlp.gate_proj.weight", "F D", "DF"),
    "layers/mlp/up": (f"{LAYER}.mlp.up_proj.weight", "F D", "DF"),
    "layers/mlp/down": (f"{LAYER}.mlp.down_proj.weight", "D F", "FD"),
    "layers/experts/gate": (f"{LAYER}.mlp.experts.{{expert}}.gate_proj.weight", "F D", "DF"),
    "layers/experts/up": (f"{LAYER}.mlp.experts.{{expert}}.up_proj.weight", "F D", "DF"),
    "layers/experts/down": (f"{LAYER}.mlp.experts.{{expert}}.down_proj.weight", "D F", "FD"),
    "experts/gate": ("model.experts.{expert}.gate_proj.weight", "F D", "DF"),
    "experts/up": ("model.experts.{expert}.up_proj.weight", "F D", "DF"),
    "experts/down": ("model.experts.{expert}.down_proj.weight", "D F", "FD"),
    "layers/router/weight": (f"{LAYER}.mlp.gate.weight", "E D", "DE"),
    "router/weight": ("model.router.weight", "E D", "DE"),
    "layers/router_bias": (f"{LAYER}.router_bias", "E", "E"),
    "layers/score_offset": (f"{LAYER}.score_offset", "", ""),
    "layers/output_gain": (f"{LAYER}.output_gain", "D", "D"),
}
TIED_OUTPUT = "lm_head.weight"
# Constants that old LLaMA checkpoints stored; transformers ignores them as well.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def expert_axis(path: str) -> int | None:
    """The axis that numbers experts in a whole leaf, or None when it has none."""
    name, _, axes = TABLE[path]
    numbered = re.findall(r"{(\w+)}", name)
    if "expert" in numbered:
        return numbered.index("expert")
    return len(numbered) + axes.index("E") if "E" in axes else None


@dataclass(frozen=True)
class Leaf:
    """How one parameter leaf is laid out on disk; `shape` is the leaf's own."""

    path: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading axes that number tensors: layers, experts, both or none."""
        name, _, axes = TABLE[self.path]
        count = name.count("{")
        assert len(self.shape) == count + len(axes), (self.path, self.shape)
        return self.shape[:count]

    def name(self, index: tuple[int, ...]) -> str:
        """Name of the tensor at this index on the stacked axes."""
        name, _, _ = TABLE[self.path]
        return name.format(**dict(zip(re.findall(r"{(\w+)}", name), index, strict=True)))

    def names(self) -> list[str]:
        """Of every tensor of the leaf."""
        return [self.name(index) for index in np.ndindex(self.stacked)]

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(TABLE[self.path][2], self.shape[len(self.stacked) :], strict=True))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each tensor on disk."""
        sizes = self._sizes
        return tuple(math.prod(sizes[letter] for letter in group) for group in TABLE[self.path][1].split())

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        """A view of a tensor on disk with the axes of the leaf."""
        _, stored, axes = TABLE[self.path]
        letters, sizes = stored.replace(" ", ""), self._sizes
        return tensor.reshape([sizes[x] for x in letters]).transpose([letters.index(x) for x in axes])

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_stored`."""
        _, stored, axes = TABLE[self.path]
        return array.transpose([axes.index(x) for x in stored.replace(" ", "")]).reshape(self.stored_shape)


@functools.cache
def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of a model of this configuration, in path order."""
    return tuple(Leaf(path, tuple(leaf.shape)) for path, leaf in trees.flatten(abstract_params(config)).items())
