"""Scores -> which experts to keep, named by (row, index): the row is the layer, or 0 for a shared pool."""

import math

import numpy as np

from moe_reduce.core.errors import UserError

Kept = tuple[tuple[int, ...], ...]  # for each row, the kept indices in ascending order

SUPER_PERCENTILE = 99.5  # of all largest activations
SUPER_SHARE = 0.1  # of the largest of all
SUPER_LAYERS = 0.75  # of the layers, from the first


def keep_by_row(scores_NE: np.ndarray, keep: int, protected: frozenset[tuple[int, int]] = frozenset()) -> Kept:
    """The `keep` best of each row; protected ones first. Ties go to the lower index."""
    rows, experts = scores_NE.shape
    _check_keep(keep, experts)
    kept = []
    for row in range(rows):
        guarded = [expert for expert in range(experts) if (row, expert) in protected]
        if len(guarded) > keep:
            raise UserError(f"{len(guarded)} experts of layer {row} are protected, but only {keep} are to be kept")
        others = [int(expert) for expert in _best(scores_NE[row]) if (row, int(expert)) not in protected]
        kept.append(tuple(sorted(guarded + others[: keep - len(guarded)])))
    return tuple(kept)


def keep_overall(
    scores_NE: np.ndarray,
    keep: int,
    floor: int,
    protected: frozenset[tuple[int, int]] = frozenset(),
    caller_NE: np.ndarray | None = None,
) -> Kept:
    """The `keep` best in one ranking, at least `floor` for each layer.

    Scores are divided by the mean of their layer first: layers differ in scale, not in worth. caller_NE: the only layer
    that calls each expert; None: each row is for itself, a layer or a pool that layers share.
    """
    rows, experts = scores_NE.shape
    _check_keep(keep, rows * experts)
    caller_M = np.arange(rows).repeat(experts) if caller_NE is None else caller_NE.reshape(-1)
    sizes = np.bincount(caller_M)
    if floor > min(sizes) or floor * len(sizes) > keep:
        raise UserError(
            f"a floor of {floor} experts in each of {len(sizes)} layers does not fit into {keep} kept of {min(sizes)}"
        )
    means = np.bincount(caller_M, scores_NE.reshape(-1)) / sizes
    order = _best(scores_NE.reshape(-1) / np.where(means > 0, means, 1)[caller_M])
    first = {int(place) for layer in range(len(sizes)) for place in order[caller_M[order] == layer][:floor]}
    first |= {row * experts + index for row, index in protected}
    if len(first) > keep:
        raise UserError(f"{len(first)} experts are protected or under the floor, but only {keep} are to be kept")
    others = [int(place) for place in order if int(place) not in first]
    chosen = [divmod(place, experts) for place in (*first, *others[: keep - len(first)])]
    return tuple(tuple(sorted(index for row, index in chosen if row == wanted)) for wanted in range(rows))


def _best(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


def _check_keep(keep: int, experts: int) -> None:
    if not 1 <= keep <= experts:
        raise UserError(f"{keep} experts cannot be kept of {experts}")


def count_of(keep: float, experts: int) -> int:
    """A share in (0, 1], or a whole number above 1, -> a number of experts; a share is rounded up."""
    if 0 < keep <= 1:
        return math.ceil(round(keep * experts, 6))
    if 1 < keep < math.inf and keep == int(keep):
        return int(keep)
    raise UserError(f"--keep={keep} must be a share in (0, 1] or a whole number of experts")


def super_experts(maximum_NE: np.ndarray, home_NE: np.ndarray | None, layers: int) -> frozenset[tuple[int, int]]:
    """(row, index) of experts whose largest activation exceeds both the 99.5th percentile and a tenth of the largest.

    Only of those whose home is in the first 75 % of the layers; home_NE: as `home_layers` gives it, None for a
    pool of no layer's own. Raises UserError when there is none: protection that protects nothing.
    """
    threshold = max(float(np.percentile(maximum_NE, SUPER_PERCENTILE)), SUPER_SHARE * float(np.max(maximum_NE)))
    stands_out = maximum_NE > threshold
    if home_NE is not None:
        stands_out &= home_NE < int(SUPER_LAYERS * layers)
    if not stands_out.any():
        raise UserError(
            "no expert's largest activation stands out, so there is none to protect: leave the protection off"
        )
    return frozenset((int(row), int(index)) for row, index in np.argwhere(stands_out))
