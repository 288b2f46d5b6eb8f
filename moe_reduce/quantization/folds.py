"""Scales of activations, folded into the norm or the matrix that makes them, and out of the matrices that read them.

Dividing what makes an activation by s and multiplying the inputs of all its readers by s changes no output. `folds`
lists the places of a layer in which this is exact; `between` is the one inside an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.config import ModelConfig
from moe_reduce.models.parameters import Parameter, bias_of, norm_before, only_record

Leaves = dict[str, Any]  # values of one layer by path, without the axis of layers


@dataclass(frozen=True)
class Fold:
    """Readers of one activation, and what makes it.

    makers: records whose values are divided by the scales along the axes `made`; for a norm its scale and bias. repeat:
    number of consecutive blocks of `block` inputs of the readers that repeat one block of the maker's outputs, as query
    heads repeat a value head.
    """

    makers: tuple[Parameter, ...]
    made: str
    readers: tuple[Parameter, ...]
    repeat: int = 1
    block: int = 1

    def shared(self, size_I: jax.Array) -> jax.Array:
        """Sizes of the readers' inputs, averaged over the repetitions of each output of the maker."""
        return self._repeated(jnp.mean(size_I.reshape(-1, self.repeat, self.block), axis=1))

    def _repeated(self, parts: jax.Array) -> jax.Array:
        return jnp.broadcast_to(parts[:, None], (parts.shape[0], self.repeat, self.block)).reshape(-1)

    def apply(self, leaves: Leaves, scale_I: jax.Array) -> Leaves:
        """The layer with the scales folded: readers multiplied, makers divided. scale_I: as `shared` repeats it."""
        once = scale_I.reshape(-1, self.repeat, self.block)[:, 0].reshape(-1)
        changed = {record.path: _times(leaves[record.path], scale_I, record, record.inputs) for record in self.readers}
        changed |= {record.path: _times(leaves[record.path], 1 / once, record, self.made) for record in self.makers}
        return leaves | changed


def folds(config: ModelConfig) -> Iterator[Fold]:
    """Folds of a layer that are exact: norms into all that read them, values into outputs, up into down matrices.

    Left out are values that are clipped, the norm before a pool of experts, which all layers share, and GELU's up
    matrix, whose outputs pass through a function that is not linear in them.
    """
    query, key, value, output = (only_record(config, "attention", name) for name in ("query", "key", "value", "output"))
    yield Fold(norm_before(config, "attention"), query.inputs, (query, key, value))
    if config.clip_qkv is None:
        repeat = config.query_heads // config.key_value_heads
        makers = tuple(record for record in (value, bias_of(config, value)) if record is not None)
        yield Fold(makers, value.outputs, (output,), repeat, config.head_width)
    component = "feed_forward" if config.moe is None else "experts"
    if config.moe is not None and config.moe.placement == "shared":
        return
    gated = config.feed_forward == "swiglu"
    inward = [only_record(config, component, name) for name in (("gate", "up") if gated else ("up",))]
    readers = inward if config.moe is None else [*inward, only_record(config, "router")]
    yield Fold(norm_before(config, "mlp"), inward[0].inputs, tuple(readers))
    if gated and config.moe is None:
        yield between(config, component)


def between(config: ModelConfig, component: str) -> Fold:
    """Fold of the up matrix into the down matrix of a SwiGLU block, or of one expert."""
    up, down = (only_record(config, component, name) for name in ("up", "down"))
    makers = tuple(record for record in (up, bias_of(config, up)) if record is not None)
    return Fold(makers, up.outputs, (down,))


def _times(value: jax.Array, scale_I: jax.Array, record: Parameter, letters: str) -> jax.Array:
    """A value, without the axis of layers or of experts, times scales along the axes of some letters, in its dtype."""
    axes = record.axes[-value.ndim :]
    shape = [size if letter in letters else 1 for letter, size in zip(axes, value.shape, strict=True)]
    assert int(np.prod(shape)) == scale_I.size, (record.path, shape)
    spread = jnp.broadcast_to(scale_I.reshape(shape), value.shape)
    return (value.astype(jnp.float32) * spread).astype(value.dtype)
