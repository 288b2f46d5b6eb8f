"""Ranges of the values that a scale covers: the extremes, a percentile, or the range of the smallest squared error.

Values outside the range are rounded to its ends; a smaller range has finer steps.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import Scheme
from moe_reduce.models.weights.scales import Ranges, extremes, grid

Clip = Literal["min-max", "percentile", "mse"]
PERCENTILE = 99.9  # share of the magnitudes of a block that a percentile covers
SHARES = np.linspace(1.0, 0.4, 25)  # of the extremes that the search tries
TERNARY_SHARES = np.linspace(0.6, 2.0, 29)  # of the mean magnitude


def ranges(clip: str) -> Ranges:
    """The choice of ranges of this name; UserError for an unknown one."""
    found = {"min-max": extremes, "percentile": percentile, "mse": least_error}.get(clip)
    if found is None:
        raise UserError(f"clip={clip!r} is unknown; known: {', '.join(get_args(Clip))}")
    return found


def percentile(values: jax.Array, scheme: Scheme, share: float = PERCENTILE) -> tuple[jax.Array, jax.Array]:
    """A percentile of the magnitudes of each block; for an affine scheme, of the values on either side of zero."""
    if scheme.code == "ternary":
        return extremes(values, scheme)
    find = partial(jnp.percentile, q=share, axis=(-3, -1))
    if not scheme.affine:
        size = find(jnp.abs(values))
        return -size, size
    return -find(jnp.maximum(-values, 0)), find(jnp.maximum(values, 0))


def least_error(values: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """The share of each block's extremes that leaves the smallest sum of squared errors."""
    low, high = extremes(values, scheme)

    def try_share(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        least, kept = best
        points = grid(share * low, share * high, scheme)
        error = jnp.sum(jnp.square(points.values(points.codes(values, scheme), scheme) - values), axis=(-3, -1))
        better = error < least
        return (jnp.where(better, error, least), jnp.where(better, share, kept)), None

    shares = jnp.asarray(TERNARY_SHARES if scheme.code == "ternary" else SHARES, jnp.float32)
    start = (jnp.full(low.shape, jnp.inf, jnp.float32), jnp.ones(low.shape, jnp.float32))
    (_, kept), _ = jax.lax.scan(try_share, start, shares)
    return kept * low, kept * high
