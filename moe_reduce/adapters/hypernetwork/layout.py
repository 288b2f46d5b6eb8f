"""Places of adapted matrices in a base, and the rows that the network computes for them."""

from dataclasses import dataclass

import numpy as np

from moe_reduce.adapters.leaves import rank, sketch_width
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.hypernetwork_config import HypernetworkConfig

SIDES = ("in/matrix", "out/matrix")


@dataclass(frozen=True)
class Place:
    """One module: a target of the adapter, whose matrices have one head.

    layers: rows of the layer embedding; the matrices of a pool have the row after the last layer.
    """

    path: str
    name: str
    layers: tuple[int, ...]
    stacked: bool  # False for a pool, whose leaves have no layer axis
    experts: int | None
    inputs: int
    outputs: int

    @property
    def stack(self) -> tuple[int, ...]:
        """Axes of the place's matrices: [N], [N, E] or [E]."""
        experts = () if self.experts is None else (self.experts,)
        return ((len(self.layers), *experts)) if self.stacked else experts


@dataclass(frozen=True)
class Layout:
    """Sizes of a hypernetwork: its places, and the inner size R or K of the adapters that it writes."""

    head: str
    places: tuple[Place, ...]
    inner: int
    layers: int  # rows of the layer embedding
    experts: int  # rows of the expert embedding; 0 without experts

    @property
    def sides(self) -> int:
        """Number of sides that are written by separate rows."""
        return len(SIDES) if self.head in ("M", "S") else 1

    @property
    def ranks(self) -> int:
        """Number of ranks that are written by separate rows."""
        return self.inner if self.head == "S" else 1


@dataclass(frozen=True)
class Rows:
    """Indices, int32, of every pair [P] and of every row [Y]; the rows of a place follow one another."""

    module_P: np.ndarray
    layer_P: np.ndarray
    pair_Y: np.ndarray
    expert_Y: np.ndarray  # -1 in rows of a matrix without experts
    side_Y: np.ndarray  # index in the side embedding: module · 2 + side
    rank_Y: np.ndarray


def layout_of(config: HypernetworkConfig, base: ModelConfig) -> Layout:
    """Layout of a hypernetwork for this base."""
    places = tuple(
        Place(
            path=target.path,
            name=target.parameter.name,
            layers=(base.layers,) if target.layers is None else target.numbers,
            stacked=target.layers is not None,
            experts=target.experts,
            inputs=target.in_features,
            outputs=target.out_features,
        )
        for target in targets_of(config.adapter, base)
    )
    return Layout(
        head=config.head,
        places=places,
        inner=sketch_width(config.adapter) if config.head == "core" else rank(config.adapter),
        layers=base.layers + any(not place.stacked for place in places),
        experts=max(place.experts or 0 for place in places),
    )


def rows_of(layout: Layout) -> Rows:
    """Rows of a layout, by module, layer, expert, side and rank, the last running fastest."""
    pairs, rows = [], []
    for module, place in enumerate(layout.places):
        for layer in place.layers:
            pairs.append((module, layer))
            experts = (-1,) if place.experts is None else range(place.experts)
            rows += [
                (len(pairs) - 1, expert, module * len(SIDES) + side, position)
                for expert in experts
                for side in range(layout.sides)
                for position in range(layout.ranks)
            ]
    return Rows(*np.asarray(pairs, np.int32).T, *np.asarray(rows, np.int32).T)
