"""Adapted matrices as modules of PEFT: their names in transformers, and the rows of a module that each one fills.

The query, key and value matrices of GPT-NeoX are one module in transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_reduce.adapters.targets import Target
from moe_reduce.core.config import ModelConfig
from moe_reduce.storage.names import leaves

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True)
class Submatrix:
    """One adapted matrix within a module: the whole module, or some of its output rows.

    index: position of its layer in target.layers. rows: int [O], its rows among the module's outputs.
    """

    target: Target
    index: int
    rows: np.ndarray

    @property
    def layer(self) -> int:
        """Number of its layer."""
        assert self.target.layers is not None
        return self.target.layers[self.index]


def modules_of(targets: Sequence[Target], model: ModelConfig) -> dict[str, list[Submatrix]]:
    """Adapted matrices by the name of their module; experts, which are no modules in transformers 5, are left out."""
    by_path = {leaf.path: leaf for leaf in leaves(model)}
    found: dict[str, list[Submatrix]] = {}
    for target in targets:
        if target.experts is not None:
            continue
        leaf = by_path[target.path]
        numbered = np.broadcast_to(np.arange(leaf.stored_shape[0])[:, None], leaf.stored_shape)
        rows = leaf.from_stored(numbered).reshape(target.in_features, target.out_features)[0]
        for index, layer in enumerate(target.layers or ()):
            module = leaf.name((layer,)).removesuffix(".weight")
            found.setdefault(module, []).append(Submatrix(target, index, rows))
    return found


def output_sizes(model: ModelConfig) -> dict[str, int]:
    """Number of outputs of each module, by name."""
    return {
        name.removesuffix(".weight"): leaf.stored_shape[0]
        for leaf in leaves(model)
        if leaf.stored_shape
        for name in leaf.names()
    }
