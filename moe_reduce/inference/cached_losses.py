"""Losses of the tokens of a text that a model reads from its KV cache, one at a time, as decoding does."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.generate_config import CacheDtype
from moe_reduce.inference.generate import NO_SLOT
from moe_reduce.models import cache
from moe_reduce.models.cache import KEYS_VALUES
from moe_reduce.models.decoder import STACK
from moe_reduce.models.model import Model
from moe_reduce.training.losses import negative_log_likelihood

NAMES = ("tokens", "targets")


def cached_losses(model: Model, batch: Mapping[str, Any], start: int, dtype: CacheDtype) -> np.ndarray:
    """Negative log likelihood of the targets from position `start` on, fp32 [B, T - start], whatever their weights.

    model: from `generate.prepared` or `generate.ready`. batch: tokens and targets [B, T]. The first `start` tokens are
    read at once and fill the cache; each of the others sees only what the cache holds of the tokens before it.
    """
    arrays = {name: jnp.asarray(batch[name]) for name in NAMES}
    return np.asarray(_losses(model.config, model.execution, dtype, start, model.params, arrays))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _losses(
    config: ModelConfig,
    execution: ExecutionConfig,
    dtype: CacheDtype,
    start: int,
    params: Any,
    batch: dict[str, jax.Array],
) -> jax.Array:
    model, (rows, length), stacked = Model(config, params, execution), batch["tokens"].shape, STACK in params
    read = {"tokens": batch["tokens"][:, :start], "last": jnp.full((rows,), start - 1)}
    _, collected = model.apply(read, (KEYS_VALUES,))
    held = cache.of_prompts(collected[KEYS_VALUES], length, dtype, stacked)

    def step(held: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        tokens_B1, targets_B1 = (jax.lax.dynamic_slice_in_dim(batch[name], place, 1, 1) for name in NAMES)
        inputs = {"tokens": tokens_B1, "positions": jnp.full((rows, 1), place)}
        logits_B1V, collected = model.apply(inputs, (KEYS_VALUES,), held)
        losses_B = negative_log_likelihood(logits_B1V, targets_B1)[:, 0]
        # the slot depends on the loss, which orders the write after every read: else XLA copies the cache
        slots_B = jnp.where(losses_B < jnp.inf, place, NO_SLOT)
        return cache.written(held, collected[KEYS_VALUES], slots_B, stacked), losses_B

    _, losses_XB = jax.lax.scan(step, held, jnp.arange(start, length))
    return losses_XB.T
