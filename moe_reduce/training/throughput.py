"""Peak FLOP/s, the denominator of MFU: published for known accelerators, measured for all other devices."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core.devices import DEVICES

PUBLISHED_BF16 = {device.kind: device.flops for device in DEVICES.values() if device.kind}  # by jax's device kind


@dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices of a run together, and the source of the number."""

    flops: float
    source: str


def peak(devices: list[Any], dtype: str) -> Peak:
    """Published bf16 peak of a known device; otherwise the best of several matmuls in `dtype`, measured now.

    Simulated CPU devices share one machine, so the measurement is not multiplied by their number.
    """
    kind = devices[0].device_kind
    if kind in PUBLISHED_BF16:
        return Peak(PUBLISHED_BF16[kind] * len(devices), f"published bf16 peak of {kind}")
    shared = devices[0].platform == "cpu"
    measured = measure(devices[0], dtype)
    return Peak(measured * (1 if shared else len(devices)), f"matmul of 2048² in {dtype}, measured in this process")


@lru_cache  # once a process, so that runs compared side by side share a peak
def measure(device: Any, dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a square matmul on one device, best of `repeats`."""
    matrix = jax.device_put(jnp.ones((size, size), jnp.dtype(dtype)), device)
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
