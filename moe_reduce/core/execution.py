"""Choices of how a model is computed, which never change what a checkpoint means."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from moe_reduce.core.checks import positive
from moe_reduce.core.errors import UserError

DISPATCH_BY_PLATFORM = {"cpu": "blocks", "gpu": "grouped", "tpu": "ragged"}
ATTENTION_BY_PLATFORM = {"cpu": "blocks", "gpu": "xla", "tpu": "splash"}


@dataclass(frozen=True)
class ExecutionConfig:
    """Platform, precision, kernels and memory trade-offs."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # auto: resolved once, when a command starts
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # auto: by platform; blocks, here and in `dispatch`: tile by tile, for CPUs
    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"
    # layout of the operands of matrix products (models/products.py); auto: transposed for bf16 on CPUs
    products: Literal["auto", "plain", "transposed"] = "auto"
    dispatch: Literal["auto", "blocks", "ragged", "grouped", "capacity", "reference"] = "auto"  # auto: by platform
    # over mesh.expert (models/moe/exchange.py); auto: whichever sends fewer bytes
    exchange: Literal["auto", "gather", "all_to_all"] = "auto"
    capacity_factor: float = 2.0  # rows per expert / mean rows per expert; capacity dispatch only
    block_rows: int = 64  # upper limit for the rows of the smallest tile; blocks dispatch only
    expert_gradients: bool = True  # False: experts are frozen and their gradient is not computed (set by tuning)
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1  # layers unrolled in the scan; all of them run fastest on CPU and GPU and compile slowest

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        positive("execution", self, "capacity_factor", "block_rows", "scan_unroll")

    def resolve(self, default_platform: str) -> "ExecutionConfig":
        """Replace every `auto`. Commands call this once, so that no model code asks jax for its backend.

        Raises UserError for a kernel that the platform does not have.
        """
        platform = default_platform if self.platform == "auto" else self.platform
        if platform not in DISPATCH_BY_PLATFORM:
            raise UserError(f"no dispatch is known for platform {platform!r}: set execution.platform and .dispatch")
        dispatch = DISPATCH_BY_PLATFORM[platform] if self.dispatch == "auto" else self.dispatch
        bf16_on_cpu = platform == "cpu" and self.compute_dtype == "bfloat16"
        products = ("transposed" if bf16_on_cpu else "plain") if self.products == "auto" else self.products
        attention = self.attention
        if attention == "auto":  # splash is a TPU kernel: a plan for a TPU made on another platform uses xla
            attention = "xla" if platform == "tpu" != default_platform else ATTENTION_BY_PLATFORM[platform]
        found = {"platform": platform, "attention": attention, "products": products, "dispatch": dispatch}
        resolved = dataclasses.replace(self, **found)
        resolved._check_kernels(default_platform)
        return resolved

    def _check_kernels(self, default_platform: str) -> None:
        """Raise UserError for a kernel that the devices seen by jax cannot run; self: resolved."""
        if self.attention == "cudnn" and (self.platform != "gpu" or self.compute_dtype != "bfloat16"):
            raise UserError(
                "execution.attention=cudnn is for GPUs and execution.compute_dtype=bfloat16: leave it at auto"
            )
        if self.attention == "splash" and default_platform != "tpu":
            raise UserError(f"execution.attention=splash is for TPUs, but jax sees {default_platform} alone")
        if self.dispatch == "grouped" and default_platform != "gpu":
            raise UserError(f"experts on a GPU (execution.dispatch=grouped), but jax sees {default_platform} alone")
