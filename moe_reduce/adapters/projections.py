"""The fixed projections of SkeMA: made from a seed, bit for bit the same each time, and known by their hash."""

import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import hadamard_rows

Projection = dict[str, np.ndarray]


def make(method: str, width: int, size: int, seed: int, name: str) -> Projection:
    """S [k, d] of one side of one map, as {"matrix"} or, for srht, {"signs", "rows"} (see models/deltas.py).

    orthonormal: rows are orthonormal (QR of a Gaussian); needs k <= d. gaussian: entries N(0, 1/k). srht: k rows of the
    orthonormal Hadamard transform with random signs, d padded to a power of two. name: of the map, layer and side; with
    the seed it decides the numbers. Raises UserError for a width that the method cannot have.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    check(method, width, size, name)
    padded = padded_size(size)
    if method == "gaussian":
        return {"matrix": (generator.standard_normal((width, size)) / np.sqrt(width)).astype(np.float32)}
    if method == "srht":
        signs = generator.choice(np.array([-1, 1], np.float32), padded)
        return {"signs": signs, "rows": np.sort(generator.permutation(padded)[:width]).astype(np.int32)}
    directions, triangle = np.linalg.qr(generator.standard_normal((size, width)))
    # the sign that QR leaves open decides nothing but must not depend on the library
    return {"matrix": np.ascontiguousarray((directions * np.sign(np.diag(triangle))).T.astype(np.float32))}


def padded_size(size: int) -> int:
    """The power of two that a Hadamard transform needs."""
    return 1 << (size - 1).bit_length()


def largest(method: str, size: int) -> float:
    """The widest sketch of so many inputs or outputs; Gaussian ones have no end."""
    return {"orthonormal": size, "gaussian": math.inf, "srht": padded_size(size)}[method]


def check(method: str, width: int, size: int, name: str) -> None:
    """Raises UserError for a width that the method cannot have."""
    widest = largest(method, size)
    if width > widest:
        raise UserError(
            f"adapter.sketch_width ({width}) exceeds {widest}, the {method} directions of {name}: lower it, or choose "
            "adapter.projection=gaussian"
        )


def dense(projection: Mapping[str, Any], size: int) -> np.ndarray:
    """S as a matrix [k, d], float64."""
    if "matrix" in projection:
        return np.asarray(projection["matrix"], np.float64)
    signs = np.asarray(projection["signs"], np.float64)
    transform = hadamard_rows(np.asarray(projection["rows"]), len(signs)) / np.sqrt(len(signs))
    return (transform * signs)[:, :size]


def digest(projections: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(projections):
        array = np.ascontiguousarray(projections[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
