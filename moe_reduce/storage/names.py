"""Parameter leaves <-> tensors under their Hugging Face names: one table a family, read in both directions.

A tensor name with {layer} and {expert} stands for as many tensors, stacked on the first axes of the leaf. Axes are
written in the letters of moe_reduce.models; "HC D" is a matrix whose rows are heads times head width, so the table
also says how a tensor is reshaped and transposed. Rotary halves follow Hugging Face: no permutation.

A digit among the axes on disk says that leaves share the tensor: "H0C D", "H1C D" and "H2C D" under one name are its
three parts, of which each head has one after the other.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.models.parameters import abstract_params
from moe_reduce.storage.hf_config import model_type

Layout = tuple[str, str, str]  # tensor name, axes on disk, axes of the leaf behind the stacked ones
LAYER = "model.layers.{layer}"
TABLE: dict[str, Layout] = {  # by path of the leaf, of every model but GPT-NeoX
    "embedding/table": ("model.embed_tokens.weight", "V D", "VD"),
    "embedding/factor": ("model.embed_tokens.factor", "V K", "VK"),
    "embedding/projection": ("model.embed_tokens.projection", "K D", "KD"),
    "unembedding/table": ("lm_head.weight", "V D", "VD"),
    "final_norm/scale": ("model.norm.weight", "D", "D"),
    "final_norm/bias": ("model.norm.bias", "D", "D"),
    "layers/attention_norm/scale": (f"{LAYER}.input_layernorm.weight", "D", "D"),
    "layers/attention_norm/bias": (f"{LAYER}.input_layernorm.bias", "D", "D"),
    "layers/mlp_norm/scale": (f"{LAYER}.post_attention_layernorm.weight", "D", "D"),
    "layers/mlp_norm/bias": (f"{LAYER}.post_attention_layernorm.bias", "D", "D"),
    "layers/attention/query": (f"{LAYER}.self_attn.q_proj.weight", "HC D", "DHC"),
    "layers/attention/key": (f"{LAYER}.self_attn.k_proj.weight", "GC D", "DGC"),
    "layers/attention/value": (f"{LAYER}.self_attn.v_proj.weight", "GC D", "DGC"),
    "layers/attention/output": (f"{LAYER}.self_attn.o_proj.weight", "D HC", "HCD"),
    "layers/attention/query_bias": (f"{LAYER}.self_attn.q_proj.bias", "HC", "HC"),
    "layers/attention/key_bias": (f"{LAYER}.self_attn.k_proj.bias", "GC", "GC"),
    "layers/attention/value_bias": (f"{LAYER}.self_attn.v_proj.bias", "GC", "GC"),
    "layers/attention/output_bias": (f"{LAYER}.self_attn.o_proj.bias", "D", "D"),
    "layers/attention/query_norm/scale": (f"{LAYER}.self_attn.q_norm.weight", "C", "C"),
    "layers/attention/key_norm/scale": (f"{LAYER}.self_attn.k_norm.weight", "C", "C"),
    "layers/mlp/gate": (f"{LAYER}.mlp.gate_proj.weight", "F D", "DF"),
    "layers/mlp/up": (f"{LAYER}.mlp.up_proj.weight", "F D", "DF"),
    "layers/mlp/down": (f"{LAYER}.mlp.down_proj.weight", "D F", "FD"),
    "layers/mlp/gate_bias": (f"{LAYER}.mlp.gate_proj.bias", "F", "F"),
    "layers/mlp/up_bias": (f"{LAYER}.mlp.up_proj.bias", "F", "F"),
    "layers/mlp/down_bias": (f"{LAYER}.mlp.down_proj.bias", "D", "D"),
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
NEOX_LAYER = "gpt_neox.layers.{layer}"
NEOX_FUSED = f"{NEOX_LAYER}.attention.query_key_value"
NEOX_TABLE: dict[str, Layout] = {
    "embedding/table": ("gpt_neox.embed_in.weight", "V D", "VD"),
    "unembedding/table": ("embed_out.weight", "V D", "VD"),
    "final_norm/scale": ("gpt_neox.final_layer_norm.weight", "D", "D"),
    "final_norm/bias": ("gpt_neox.final_layer_norm.bias", "D", "D"),
    "layers/attention_norm/scale": (f"{NEOX_LAYER}.input_layernorm.weight", "D", "D"),
    "layers/attention_norm/bias": (f"{NEOX_LAYER}.input_layernorm.bias", "D", "D"),
    "layers/mlp_norm/scale": (f"{NEOX_LAYER}.post_attention_layernorm.weight", "D", "D"),
    "layers/mlp_norm/bias": (f"{NEOX_LAYER}.post_attention_layernorm.bias", "D", "D"),
    "layers/attention/query": (f"{NEOX_FUSED}.weight", "H0C D", "DHC"),
    "layers/attention/key": (f"{NEOX_FUSED}.weight", "H1C D", "DHC"),
    "layers/attention/value": (f"{NEOX_FUSED}.weight", "H2C D", "DHC"),
    "layers/attention/query_bias": (f"{NEOX_FUSED}.bias", "H0C", "HC"),
    "layers/attention/key_bias": (f"{NEOX_FUSED}.bias", "H1C", "HC"),
    "layers/attention/value_bias": (f"{NEOX_FUSED}.bias", "H2C", "HC"),
    "layers/attention/output": (f"{NEOX_LAYER}.attention.dense.weight", "D HC", "HCD"),
    "layers/attention/output_bias": (f"{NEOX_LAYER}.attention.dense.bias", "D", "D"),
    "layers/mlp/up": (f"{NEOX_LAYER}.mlp.dense_h_to_4h.weight", "F D", "DF"),
    "layers/mlp/up_bias": (f"{NEOX_LAYER}.mlp.dense_h_to_4h.bias", "F", "F"),
    "layers/mlp/down": (f"{NEOX_LAYER}.mlp.dense_4h_to_h.weight", "D F", "FD"),
    "layers/mlp/down_bias": (f"{NEOX_LAYER}.mlp.dense_4h_to_h.bias", "D", "D"),
}
# Constants that old checkpoints stored; transformers ignores them as well.
IGNORED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
)


def table(config: ModelConfig) -> dict[str, Layout]:
    """How the leaves of this model, and of its relatives, are named and laid out on disk."""
    return NEOX_TABLE if model_type(config) == "gpt_neox" else TABLE


def expert_axis(path: str) -> int | None:
    """The axis that numbers experts in a whole leaf, or None when it has none."""
    name, _, axes = TABLE[path]
    numbered = re.findall(r"{(\w+)}", name)
    if "expert" in numbered:
        return numbered.index("expert")
    return len(numbered) + axes.index("E") if "E" in axes else None


@dataclass(frozen=True)
class Leaf:
    """How one parameter leaf is laid out on disk; `shape` is the leaf's own, `parts` the leaves that share a tensor."""

    path: str
    shape: tuple[int, ...]
    layout: Layout
    parts: int = 1

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading axes that number tensors: layers, experts, both or none."""
        name, _, axes = self.layout
        count = name.count("{")
        assert len(self.shape) == count + len(axes), (self.path, self.shape)
        return self.shape[:count]

    def name(self, index: tuple[int, ...]) -> str:
        """Name of the tensor at this index on the stacked axes."""
        name, _, _ = self.layout
        return name.format(**dict(zip(re.findall(r"{(\w+)}", name), index, strict=True)))

    def names(self) -> list[str]:
        """Of every tensor of the leaf."""
        return [self.name(index) for index in np.ndindex(self.stacked)]

    @property
    def _sizes(self) -> dict[str, int]:
        """By letter; a digit stands for the parts."""
        sizes = dict(zip(self.layout[2], self.shape[len(self.stacked) :], strict=True))
        return sizes | {letter: self.parts for letter in self.layout[1] if letter.isdigit()}

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each tensor on disk."""
        sizes = self._sizes
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.layout[1].split())

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        """A view of what a tensor on disk holds of the leaf, with the axes of the leaf."""
        _, stored, axes = self.layout
        letters, sizes = stored.replace(" ", ""), self._sizes
        part = [int(letter) if letter.isdigit() else slice(None) for letter in letters]
        left = [letter for letter in letters if letter.isalpha()]
        # the ellipsis keeps a scalar an array
        return tensor.reshape([sizes[x] for x in letters])[*part, ...].transpose([left.index(x) for x in axes])

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_stored`, of a leaf that shares its tensor with none."""
        assert self.parts == 1, self.path
        _, stored, axes = self.layout
        return array.transpose([axes.index(x) for x in stored.replace(" ", "")]).reshape(self.stored_shape)


def to_stored(pieces: Sequence[tuple[Leaf, np.ndarray]]) -> np.ndarray:
    """The tensor on disk of all the leaves that share it, or of one that does not, at one stacked index."""
    first, array = pieces[0]
    if first.parts == 1:
        return first.to_stored(array)
    tensor = np.empty(first.stored_shape, array.dtype)
    for leaf, array in pieces:
        leaf.from_stored(tensor)[...] = array
    return tensor


@functools.cache
def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of a model of this configuration, in path order."""
    flat = trees.flatten(abstract_params(config))
    layouts = {path: table(config)[path] for path in flat}
    parts = Counter(name for name, _, _ in layouts.values())
    return tuple(Leaf(path, tuple(flat[path].shape), layout, parts[layout[0]]) for path, layout in layouts.items())
