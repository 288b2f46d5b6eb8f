"""Parts of a model's architecture that only some attention layers have: rotary scaling, latent and linear attention."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_reduce.core.checks import positive
from moe_reduce.core.errors import UserError

LINEAR, SOFTMAX = "l", "s"  # letters of LinearAttention.pattern


@dataclass(frozen=True)
class RotaryScaling:
    """Change of the rotary frequencies that lets a model read more positions than it was first trained on.

    linear: all divided by `factor` (arXiv:2306.15595). dynamic: a larger base where a text is longer than
    `max_positions`. yarn: low frequencies divided, high ones kept (arXiv:2309.00071). llama3: the same with other
    bounds (arXiv:2407.21783).
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3"] = "linear"
    factor: float = 1.0
    original_positions: int | None = None  # context of the first training, yarn and llama3; None: max_positions
    beta_fast: float = 32.0  # yarn: frequencies that turn more often than this within the first context are kept
    beta_slow: float = 1.0  # yarn: frequencies that turn less often than this are divided by factor
    truncate: bool = True  # yarn: round the bounds to whole channels
    attention_factor: float | None = None  # yarn: of sines and cosines; None: from factor and the two mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3

    def check(self) -> None:
        """Raise UserError for a number that is out of range."""
        positive("model.rotary_scaling", self, "factor", "beta_fast", "beta_slow")
        if self.original_positions is not None:
            positive("model.rotary_scaling", self, "original_positions")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise UserError(
                f"model.rotary_scaling.low_frequency_factor ({self.low_frequency_factor}) must be above 0 and below "
                f"high_frequency_factor ({self.high_frequency_factor})"
            )

    def positions(self, max_positions: int) -> int:
        """Number of positions that a model can read. max_positions: the number that its config states."""
        if self.kind in ("linear", "dynamic"):
            return int(self.factor * max_positions)
        if self.kind == "yarn":
            return max(max_positions, int(self.factor * (self.original_positions or max_positions)))
        return max_positions

    @property
    def turn_scale(self) -> float:
        """Factor of sines and cosines."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def latent_scale(self) -> float:
        """Factor of the scores of latent attention, beside that of the head's width."""
        return self._growth(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _growth(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made of one small vector.

    A head's query and key are `ModelConfig.head_width` wide, of which the last `rotary_width` channels are rotated; the
    rotated part of a key is the same in all heads. The cache holds the vector and the rotated part of the key.
    """

    rank: int = 0  # L, width of the vector that keys and values are made of
    rotary_width: int = 0
    value_width: int = 0  # W, width of a head's value
    query_rank: int | None = None  # Q, width of the vector that queries are made of; None: made of x itself

    @property
    def cached_width(self) -> int:
        """Numbers that the cache holds of a token in a layer."""
        return self.rank + self.rotary_width

    def check(self, head_width: int) -> None:
        """Raise UserError when the widths contradict each other."""
        positive("model.latent", self, "rank", "rotary_width", "value_width")
        if self.query_rank is not None:
            positive("model.latent", self, "query_rank")
        if self.rotary_width % 2 or self.rotary_width >= head_width:
            raise UserError(
                f"model.latent.rotary_width must be even and below model.head_width ({head_width}), got "
                f"{self.rotary_width}"
            )


@dataclass(frozen=True)
class LinearAttention:
    """Gated DeltaNet (arXiv:2412.06464) in some layers: a state of fixed size in place of keys and values.

    A causal convolution over each channel precedes queries, keys and values. A key head serves value_heads / key_heads
    neighbouring value heads.
    """

    key_heads: int = 0  # of queries too
    value_heads: int = 0  # R
    key_width: int = 0  # width of a head's query and key
    value_width: int = 0  # width of a head's value
    taps: int = 4  # P, inputs that the convolution reads, the newest included
    # queries, keys, values and gates are made by one matrix, whose outputs are in groups by key head
    joined: bool = False
    pattern: str = ""  # a letter for each layer: "l" with linear attention, "s" with softmax attention

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers with linear attention."""
        return tuple(layer for layer, letter in enumerate(self.pattern) if letter == LINEAR)

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads

    @property
    def keys(self) -> int:
        """Width of the keys of all heads."""
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        """Width of the values of all heads."""
        return self.value_heads * self.value_width

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values of all heads."""
        return 2 * self.keys + self.values

    @property
    def state_size(self) -> int:
        """Numbers of the state of a layer, without the inputs that the convolution keeps."""
        return self.value_heads * self.key_width * self.value_width

    def check(self, layers: int) -> None:
        """Raise UserError when the sizes contradict each other."""
        positive("model.linear", self, "key_heads", "value_heads", "key_width", "value_width", "taps")
        if self.value_heads % self.key_heads:
            raise UserError(
                f"model.linear.value_heads ({self.value_heads}) must be a multiple of model.linear.key_heads "
                f"({self.key_heads})"
            )
        if len(self.pattern) != layers or LINEAR not in self.pattern or not set(self.pattern) <= {LINEAR, SOFTMAX}:
            raise UserError(
                f"model.linear.pattern={self.pattern!r} must have a letter for each of {layers} layers, {LINEAR!r} or "
                f"{SOFTMAX!r}, and at least one {LINEAR!r}: leave model.linear out if no layer has linear attention"
            )
