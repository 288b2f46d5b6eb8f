"""The rule that decides which keys a query sees; every attention kernel and the FLOP count take it from here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask


@dataclass(frozen=True)
class Visibility:
    """Causal attention within segments: a query sees its own position and the earlier positions of its segment.

    Each method gives the rule in the form that one computation takes. To add a rule, change these methods; callers stay
    as they are.

    segments_BT: index of each token's document within its row; None if each row is one document. window: number of
    most recent positions that a query of this layer sees, its own included; None: all.
    """

    config: ModelConfig
    segments_BT: jax.Array | None = None
    window: int | None = None

    def within_rows(self, time: int) -> jax.Array:
        """Mask of T tokens attending to one another, [B or 1, 1, query T, key T]."""
        steps_T = jnp.arange(time, dtype=jnp.int32)
        seen_11TT = (steps_T[:, None] >= steps_T[None, :])[None, None]
        if self.window is not None:
            seen_11TT &= (steps_T[:, None] - steps_T[None, :] < self.window)[None, None]
        same_B1TT = self._same_segment()
        return seen_11TT if same_B1TT is None else seen_11TT & same_B1TT

    def key_range(self, start: int, end: int) -> tuple[int, int]:
        """Smallest range (first, last + 1) of keys that includes all keys seen by a row's queries start to end - 1."""
        return (0 if self.window is None else max(0, start - self.window + 1)), end

    def with_cache(self, positions_BT: jax.Array, entries: int) -> jax.Array:
        """Mask of T new tokens attending to P cache entries, then to one another, [B, 1, 1, query T, key P + T].

        positions_BT: consecutive in each segment. Cache entry p is visible if p comes before the row's first new
        position. A row's cache holds one document, and each segment of new tokens continues it.
        """
        shape = (*positions_BT.shape, entries)
        old_BTP = jnp.broadcast_to(jnp.arange(entries)[None, None] < positions_BT[:, :1, None], shape)
        new_BTT = jnp.broadcast_to(jnp.tri(shape[1], dtype=bool)[None], (*shape[:2], shape[1]))
        if self.window is not None:
            old_BTP &= positions_BT[:, :, None] - jnp.arange(entries)[None, None] < self.window
            new_BTT &= positions_BT[:, :, None] - positions_BT[:, None, :] < self.window
        same_B1TT = self._same_segment()
        new_BTT = new_BTT if same_B1TT is None else new_BTT & same_B1TT[:, 0]
        return jnp.concatenate([old_BTP, new_BTT], axis=-1)[:, None, None]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `jax.nn.dot_product_attention`."""
        given = {"mask": self._same_segment(), "is_causal": True}
        return given if self.window is None else given | {"local_window_size": (self.window - 1, 0)}

    def splash_mask(self, time: int) -> "splash_attention_mask.Mask":
        """Mask of one head for the Splash kernel, [time, time]; the kernel takes segments beside it."""
        # imported here, since counting FLOPs needs no kernel
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

        if self.window is not None:
            return splash_attention_mask.LocalMask((time, time), (self.window - 1, 0), offset=0)
        return splash_attention_mask.CausalMask((time, time))

    def keys_per_token(self, sequence_length: int) -> float:
        """Mean number of keys that a token of a sequence sees, summed over query heads and layers with softmax."""
        layers = sum(not self.config.is_linear(layer) for layer in range(self.config.layers))
        if self.config.sliding_window is None:
            return layers * self.config.query_heads * (sequence_length + 1) / 2
        windows = (min(self.config.window(layer) or sequence_length, sequence_length) for layer in range(layers))
        # the first w queries see 1 to w keys, the others w
        seen = sum(w * (w + 1) / 2 + (sequence_length - w) * w for w in windows)
        return self.config.query_heads * seen / sequence_length

    def _same_segment(self) -> jax.Array | None:
        segments_BT = self.segments_BT
        return None if segments_BT is None else segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
