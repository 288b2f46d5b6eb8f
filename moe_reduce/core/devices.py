"""Accelerators (memory, bandwidth and peak, from the makers' data sheets) and the sizes of number formats."""

import re
from dataclasses import dataclass

from moe_reduce.core.errors import UserError

GB = 10**9
GIB = 2**30

# nominal bits per value, including the scales of a quantised block where the format fixes the block size
BITS = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "int8": 8.0,
    "mxfp4": 4.25,  # blocks of 32 with an 8-bit scale
    "nf4": 4.127,  # blocks of 64 whose scales are quantised themselves (QLoRA, arXiv:2305.14314)
    "int4": 4.0,
    "ternary": 1.58,
}
# bits per weight of files of llama.cpp, which only the table of formats knows
GGUF_BITS = {
    "Q4_K_M": 4.89,  # 4.5 and 6.56 bits, mixed by tensor: llama.cpp's figure for Llama 3.1 8B; others differ by 0.1
    "Q4_0": 4.5,  # blocks of 32 with a 16-bit scale
}
CACHE_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "fp8": 8.0, "int4": 4.0}  # per value of the cache


@dataclass(frozen=True)
class Device:
    """One card or chip. Units: bytes, bytes per second, dense bf16 FLOP/s."""

    name: str
    memory: int
    bandwidth: float
    flops: float
    kind: str | None = None  # jax's name of the device
    cores: str | None = None  # libtpu's setting that makes a chip's two cores one device, as on a TPU VM


DEVICES = {
    device.name: device
    for device in (
        Device("rtx4090", 24 * GIB, 1.008e12, 165e12),
        Device("rtx5090", 32 * GIB, 1.792e12, 210e12),
        Device("a100-40", 40 * GIB, 1.555e12, 312e12),
        Device("a100", 80 * GIB, 2.039e12, 312e12),
        Device("h100", 80 * GIB, 3.35e12, 989e12, "NVIDIA H100 80GB HBM3"),
        Device("h200", 141 * GB, 4.8e12, 989e12, "NVIDIA H200"),
        Device("b200", 180 * GB, 7.7e12, 2250e12),
        Device("v4", 32 * GIB, 1.228e12, 275e12, "TPU v4", cores="megacore"),
        Device("v5e", 16 * GIB, 0.819e12, 197e12, "TPU v5 lite"),
        Device("v5p", 95 * GIB, 2.765e12, 459e12, "TPU v5"),
        Device("v6e", 32 * GIB, 1.64e12, 918e12, "TPU v6 lite"),
    )
}


def device(name: str) -> Device:
    """Look up a device by name; UserError lists the known names."""
    if name not in DEVICES:
        raise UserError(f"device {name!r} is unknown; known: {', '.join(DEVICES)}")
    return DEVICES[name]


PREFIXES = {prefix: 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T", "P"))}
PREFIXES |= {f"{prefix}i": 1024**power for power, prefix in enumerate("KMGTP", 1)}


def quantity(option: str, text: str, unit: str) -> float:
    """Read a positive amount such as 16GB, 448GB/s or 0.2PFLOP/s, in `unit` (B, B/s or FLOP/s) without a prefix.

    Raises UserError that names the option for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?([kMGTP]?|[KMGTP]i)" + re.escape(unit), text)
    if found is None or float(found[1]) == 0:
        raise UserError(f"{option}={text} is no amount: give a positive number with its unit, such as 16G{unit}")
    return float(found[1]) * PREFIXES[found[2]]
