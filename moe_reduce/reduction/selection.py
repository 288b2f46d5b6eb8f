"""Choice of the experts to keep, from their scores.

An expert is named by (row, index); the row is the layer, or 0 for a shared pool.
"""

import math

import numpy as np

from moe_reduce.core.errors import UserError

KeptExperts = tuple[tuple[int, ...], ...]  # for each row, the kept expert numbers in ascending order

# super experts, whose largest activations stand out:
SUPER_PERCENTILE = 99.5  # they exceed this percentile of the largest activations of all experts
SUPER_SHARE = 0.1  # they exceed this share of the largest activation of any expert
SUPER_LAYERS = 0.75  # they are sought in this share of the layers, counted from the first


def keep_by_row(
    scores_NE: np.ndarray, keep: int, protected: frozenset[tuple[int, int]] = frozenset(), groups: int = 1
) -> KeptExperts:
    """Keep the `keep` best experts of each row, protected ones first; ties keep the lower index.

    groups: number of equal groups of a row's experts that the router chooses among; each keeps equally many. Raises
    UserError when a row has fewer than `keep` experts, or more protected ones, or `groups` do not divide `keep`.
    """
    rows, experts = scores_NE.shape
    if groups > 1:
        return _keep_by_group(scores_NE, keep, protected, groups)
    _check_keep(keep, experts)
    kept = []
    for row in range(rows):
        guarded = [expert for expert in range(experts) if (row, expert) in protected]
        if len(guarded) > keep:
            raise UserError(
                f"{len(guarded)} experts of layer {row} are protected, but only {keep} are to be kept: keep more"
            )
        others = [int(expert) for expert in _best(scores_NE[row]) if (row, int(expert)) not in protected]
        kept.append(tuple(sorted(guarded + others[: keep - len(guarded)])))
    return tuple(kept)


def _keep_by_group(scores_NE: np.ndarray, keep: int, protected: frozenset[tuple[int, int]], groups: int) -> KeptExperts:
    if keep % groups:
        raise UserError(f"{keep} experts cannot be kept equally of {groups} groups: keep a multiple of {groups}")
    rows, size = scores_NE.shape[0], scores_NE.shape[1] // groups
    guarded = frozenset((row * groups + index // size, index % size) for row, index in protected)
    kept = keep_by_row(scores_NE.reshape(rows * groups, size), keep // groups, guarded)
    return tuple(
        tuple(group * size + index for group in range(groups) for index in kept[row * groups + group])
        for row in range(rows)
    )


def keep_overall(
    scores_NE: np.ndarray,
    keep: int,
    floor: int,
    protected: frozenset[tuple[int, int]] = frozenset(),
    exclusive_layer_E: np.ndarray | None = None,
) -> KeptExperts:
    """Keep the `keep` best experts in one ranking over all rows, and at least `floor` in each layer.

    Scores are first divided by the mean of their layer, because the sizes of outputs differ between layers. protected:
    (row, index) of experts that are kept whatever their scores. exclusive_layer_E: for each expert of a pool, the only
    layer that can choose it; None for a per-layer model, and for a pool where several layers can choose an expert.
    Raises UserError when floor and protected experts together exceed `keep`.
    """
    rows, experts = scores_NE.shape
    _check_keep(keep, rows * experts)
    layer_M = np.arange(rows).repeat(experts) if exclusive_layer_E is None else exclusive_layer_E.reshape(-1)
    sizes = np.bincount(layer_M)
    if floor > min(sizes) or floor * len(sizes) > keep:
        raise UserError(
            f"a floor of {floor} experts in each of {len(sizes)} layers does not fit: {keep} are to be kept, and the "
            f"smallest layer has {min(sizes)}; lower the floor or keep more"
        )
    means = np.bincount(layer_M, scores_NE.reshape(-1)) / sizes
    order = _best(scores_NE.reshape(-1) / np.where(means > 0, means, 1)[layer_M])
    first = {int(place) for layer in range(len(sizes)) for place in order[layer_M[order] == layer][:floor]}
    first |= {row * experts + index for row, index in protected}
    if len(first) > keep:
        raise UserError(
            f"{len(first)} experts are protected or kept by the floor, but only {keep} are to be kept: keep more"
        )
    others = [int(place) for place in order if int(place) not in first]
    chosen = [divmod(place, experts) for place in (*first, *others[: keep - len(first)])]
    return tuple(tuple(sorted(index for row, index in chosen if row == wanted)) for wanted in range(rows))


def _best(values: np.ndarray) -> np.ndarray:
    """Indices in descending order of their values; ties keep the lower index first."""
    return np.argsort(-values, kind="stable")


def _check_keep(keep: int, experts: int) -> None:
    if not 1 <= keep <= experts:
        raise UserError(f"{keep} experts cannot be kept of {experts}: keep from 1 to {experts}")


def count_of(keep: float, experts: int, key: str = "--keep") -> int:
    """Number of experts given by `keep`: a share in (0, 1], rounded up, or a whole number above 1.

    key: name of the option in messages. Raises UserError for anything else.
    """
    if 0 < keep <= 1:
        return math.ceil(round(keep * experts, 6))
    if 1 < keep < math.inf and keep == int(keep):
        return int(keep)
    raise UserError(f"{key}={keep} must be a share in (0, 1] or a whole number of experts")


def super_experts(maximum_NE: np.ndarray, home_layer_NE: np.ndarray | None, layers: int) -> frozenset[tuple[int, int]]:
    """Find experts whose largest activation exceeds both the 99.5th percentile and a tenth of the largest of all.

    Returns (row, index) of those that come from the first 75 % of the layers. maximum_NE: largest |f| of each expert.
    home_layer_NE: the layer that each came from, as `provenance.home_layers` returns it; None: all layers count. Raises
    UserError when there is no such expert, because then nothing would be protected.
    """
    threshold = max(float(np.percentile(maximum_NE, SUPER_PERCENTILE)), SUPER_SHARE * float(np.max(maximum_NE)))
    stands_out = maximum_NE > threshold
    if home_layer_NE is not None:
        stands_out &= home_layer_NE < int(SUPER_LAYERS * layers)
    if not stands_out.any():
        raise UserError(
            "no expert's largest activation stands out, so there is none to protect: leave the protection off"
        )
    return frozenset((int(row), int(index)) for row, index in np.argwhere(stands_out))
