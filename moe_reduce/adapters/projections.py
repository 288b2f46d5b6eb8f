"""Fixed random projections of SkeMA: reproducible from a seed bit for bit, and identified by a hash."""

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
    """A projection S [K, size] for one side of one matrix, as {"matrix"} or, for srht, {"signs", "rows"}.

    orthonormal: orthonormal rows (QR of a Gaussian matrix); needs K <= size. gaussian: entries N(0, 1/K). srht: K rows
    of the orthonormal Hadamard transform with random signs, with `size` padded to a power of two (arXiv:1011.1595).
    name: identifies matrix, layer and side; together with the seed it determines the numbers. Raises UserError if the
    method cannot have this width. See models/deltas.py for how S is applied.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    check(method, width, size, name)
    if method == "gaussian":
        return {"matrix": (generator.standard_normal((width, size)) / np.sqrt(width)).astype(np.float32)}
    if method == "srht":
        padded = padded_size(size)
        signs = generator.choice(np.array([-1, 1], np.float32), padded)
        return {"signs": signs, "rows": np.sort(generator.permutation(padded)[:width]).astype(np.int32)}
    directions, triangle = np.linalg.qr(generator.standard_normal((size, width)))
    # QR does not determine the signs; fix them, so that they do not depend on the LAPACK in use
    return {"matrix": np.ascontiguousarray((directions * np.sign(np.diag(triangle))).T.astype(np.float32))}


def shapes(method: str, width: int, size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of each array that `make` returns, by name."""
    if method == "srht":
        return {"signs": ((padded_size(size),), np.float32), "rows": ((width,), np.int32)}
    return {"matrix": ((width, size), np.float32)}


def padded_size(size: int) -> int:
    """Next power of two, which a Hadamard transform needs."""
    return 1 << (size - 1).bit_length()


def largest(method: str, size: int) -> float:
    """Largest sketch width for `size` inputs or outputs; infinite for gaussian."""
    return {"orthonormal": size, "gaussian": math.inf, "srht": padded_size(size)}[method]


def check(method: str, width: int, size: int, name: str) -> None:
    """Raise UserError if the method cannot have this width."""
    widest = largest(method, size)
    if width > widest:
        raise UserError(
            f"adapter.sketch_width ({width}) exceeds {widest}, the most for {method} projections of {name}: lower it, "
            "or choose adapter.projection=gaussian"
        )


def dense(projection: Mapping[str, Any], size: int) -> np.ndarray:
    """S as a matrix [K, size], float64."""
    if "matrix" in projection:
        return np.asarray(projection["matrix"], np.float64)
    signs = np.asarray(projection["signs"], np.float64)
    transform = hadamard_rows(np.asarray(projection["rows"]), len(signs)) / np.sqrt(len(signs))
    return (transform * signs)[:, :size]


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()
