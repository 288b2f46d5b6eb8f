"""The chain of steps that made a model, and the original layer and index of each expert."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.core.model_config import ModelConfig


@dataclass(frozen=True)
class Input:
    """An input of a step: its path as given, and the SHA-256 of its manifest or, without one, as `input_of` says."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Step:
    """One link of the chain from the first weights to these."""

    command: str
    arguments: dict[str, Any]
    inputs: tuple[Input, ...]
    parameters_before: int
    parameters_after: int
    quality: dict[str, Any] | None = None  # measured figures, by metric name
    kept_experts: Any = None  # original (layer, index) of each expert kept, in the order of the new pool or pools


def originals(config: ModelConfig, chain: tuple[Step, ...]) -> list[list[list[int]]]:
    """Original (layer, index) of every expert, by row of experts, according to the chain.

    Layers are counted from the first that has experts. Raises UserError when the chain lists other experts than the
    model can have, as a damaged manifest does.
    """
    moe = config.moe
    assert moe is not None
    for step in reversed(chain):
        if step.kept_experts is not None:
            _check_kept(step.kept_experts, 1 if moe.placement == "shared" else config.expert_layers, moe.experts)
            return step.kept_experts
    if moe.placement == "shared":
        return [[[0, index] for index in range(moe.experts)]]
    return [[[layer, index] for index in range(moe.experts)] for layer in range(config.expert_layers)]


def _check_kept(kept: list[list[list[int]]], rows: int, experts: int) -> None:
    different = {tuple(pair) for row in kept for pair in row}
    if [len(row) for row in kept] != [experts] * rows or len(different) != rows * experts:
        raise UserError(
            f"kept_experts in the model's manifest.json must list {rows} x {experts} different experts, and lists "
            f"{len(different)} in {len(kept)} rows: restore the file, or remove it to begin a new history"
        )


def home_layers(config: ModelConfig, chain: tuple[Step, ...]) -> np.ndarray | None:
    """Home layer of every expert: the layer of this model that it came from, [N, E], or [1, E] for a pool.

    The number of layers, N, stands for a home layer that was dropped since. None for a pool whose chain does not record
    home layers, such as a pool that was trained from scratch.
    """
    moe = config.moe
    assert moe is not None
    if moe.placement == "layer":
        return np.repeat(np.arange(config.expert_layers)[:, None], moe.experts, axis=1)
    # the chain names layers by their index at the pooling step, which lists them all; later steps may drop some
    pooled = [*itertools.dropwhile(lambda step: step.kept_experts is None or len(step.kept_experts) > 1, chain)]
    layers = [*dict.fromkeys(layer for layer, _ in pooled[0].kept_experts[0])] if pooled else []
    for step in pooled[1:]:
        if step.command == "drop-layers":
            dropped = [layer - config.dense_layers for layer in step.arguments.get("layers", [])]  # dense ones stay
            layers = [layer for index, layer in enumerate(layers) if index not in dropped]
    if len(layers) != config.expert_layers:
        return None
    present = {layer: index for index, layer in enumerate(layers)}
    (row,) = originals(config, chain)
    return np.array([[present.get(layer, config.expert_layers) for layer, _ in row]])
