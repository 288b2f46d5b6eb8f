"""Settings of text generation."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_reduce.core.checks import positive
from moe_reduce.core.errors import UserError

CacheDtype = Literal["auto", "int8", "fp8", "int4"]


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling, length and end of generated text (inference/generate.py)."""

    max_tokens: int = 128  # new tokens for each prompt
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int | None = None  # sample from the k most probable tokens
    top_p: float = 1.0  # sample from the most probable tokens that hold this share together (arXiv:1904.09751)
    seed: int = 0
    end_ids: tuple[int, ...] = ()  # tokens that end a text
    cache_dtype: CacheDtype = "auto"  # auto: execution.compute_dtype

    def check(self) -> None:
        """Raise UserError at the first number that is out of range."""
        positive("", self, "max_tokens", "top_p", *(() if self.top_k is None else ("top_k",)))
        if self.top_p > 1:
            raise UserError(f"top_p must be at most 1, got {self.top_p}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 (the most probable token) or above, got {self.temperature}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be at least 0 and below 2**32, got {self.seed}")
