"""Modules of PEFT for adapted matrices: their names in transformers, and the rows that each matrix fills.

The query, key and value matrices of GPT-NeoX are one module in transformers. Experts and routers have the names of
transformers 4, where each expert and each router is a module; PEFT reads these with transformers 5 as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_reduce import families
from moe_reduce.adapters.targets import Target
from moe_reduce.core.config import ModelConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


@dataclass(frozen=True)
class Submatrix:
    """One adapted matrix within a module: the whole module, or some of its output rows.

    index: position of its layer in target.layers. rows: int [O], its rows among the module's outputs. expert: its
    number; None for a matrix that is not one of several experts.
    """

    target: Target
    index: int
    rows: np.ndarray
    expert: int | None = None

    @property
    def layer(self) -> int:
        """Place of its layer in the target's stack."""
        assert self.target.layers is not None
        return self.target.layers[self.index]


def modules_of(targets: Sequence[Target], model: ModelConfig) -> dict[str, list[Submatrix]]:
    """Adapted matrices by the name of their module.

    Without shared pools, which transformers does not have, and without experts that are one tensor, and no module.
    """
    by_path = families.by_path(model)
    found: dict[str, list[Submatrix]] = {}
    for target in targets:
        leaf = by_path[target.path]
        if leaf.stored_expert_axis is not None and target.experts is not None:
            continue
        numbered = np.broadcast_to(np.arange(leaf.stored_shape[0])[:, None], leaf.stored_shape)
        rows = leaf.from_stored(numbered).reshape(target.in_features, target.out_features)[0]
        for index, layer in enumerate(target.layers or ()):
            if target.experts is None:
                found.setdefault(leaf.module((layer,)), []).append(Submatrix(target, index, rows))
                continue
            for expert in range(target.experts):
                found[leaf.module((layer, expert))] = [Submatrix(target, index, rows, expert)]
    return found


def output_sizes(model: ModelConfig) -> dict[str, int]:
    """Number of outputs of each module, by name."""
    return {
        leaf.module(index): leaf.stored_shape[0]
        for leaf in families.parameter_layouts(model)
        if leaf.stored_shape
        for index in np.ndindex(leaf.stacked)
    }
