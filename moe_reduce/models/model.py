"""A model as one value: its configuration, its parameters and how it computes."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.models.decoder import Decoder
from moe_reduce.models.deltas import variables


@dataclass(frozen=True, eq=False)
class Model:
    """(config, params) and where they come from. Transforms take one and return another, never changing it."""

    config: ModelConfig
    params: dict[str, Any]
    execution: ExecutionConfig
    source: Path | None = None  # directory whose tokenizer belongs to this model
    hf_config: dict[str, Any] | None = None  # config.json as it was read
    chain: tuple[Step, ...] = ()

    def __call__(self, tokens_BT: Any) -> jax.Array:
        """Token ids, integers [B, T] -> fp32 logits [B, T, V]. Compiled once for each shape."""
        if not isinstance(tokens_BT, Tracer):
            tokens_BT = _checked(np.asarray(tokens_BT), self.config.vocab_size)
        return _logits(self.config, self.execution, self.params, jnp.asarray(tokens_BT, jnp.int32))


def _checked(tokens_BT: np.ndarray, vocab_size: int) -> np.ndarray:
    # Inside jit an id beyond the table would silently become another one.
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu" or tokens_BT.size == 0:
        raise UserError(f"tokens must be integers [B, T], got {tokens_BT.dtype} {tokens_BT.shape}")
    if tokens_BT.min() < 0 or tokens_BT.max() >= vocab_size:
        raise UserError(f"token ids must be in 0..{vocab_size - 1}, got {tokens_BT.min()}..{tokens_BT.max()}")
    return tokens_BT


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: ModelConfig, execution: ExecutionConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    logits_BTV = Decoder(config, execution).apply(variables(params), tokens_BT)
    assert isinstance(logits_BTV, jax.Array)
    return logits_BTV
