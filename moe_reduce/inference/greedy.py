"""Completions of many prompts at once, each token the most probable one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.config import ExecutionConfig, ModelConfig
from moe_reduce.models.decoder import Decoder
from moe_reduce.models.deltas import variables


def complete(
    config: ModelConfig, execution: ExecutionConfig, params: Any, prompts: Sequence[Sequence[int]], tokens: int
) -> np.ndarray:
    """Ids of prompts of any lengths -> int32 [B, tokens], what follows each. Compiled for each longest prompt."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    rows_BT = np.zeros((len(prompts), int(lengths_B.max()) + tokens), np.int32)
    for row, prompt in zip(rows_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows_BT = np.asarray(_extend(config, execution, tokens, params, jnp.asarray(rows_BT), jnp.asarray(lengths_B)))
    return np.stack([row[length : length + tokens] for row, length in zip(rows_BT, lengths_B, strict=True)])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _extend(config: ModelConfig, execution: ExecutionConfig, tokens: int, params: Any, rows_BT, lengths_B):
    decoder = Decoder(config, execution)
    collections = variables(params)
    places_B = jnp.arange(rows_BT.shape[0])

    def step(number, rows_BT):
        logits_BTV: Any = decoder.apply(collections, rows_BT)  # what lies behind a place does not reach it
        chosen_B = jnp.argmax(logits_BTV[places_B, lengths_B + number - 1], axis=-1)
        return rows_BT.at[places_B, lengths_B + number].set(chosen_B.astype(jnp.int32))

    return jax.lax.fori_loop(0, tokens, step, rows_BT)
