"""A model as an immutable value, and its forward pass."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.models.cache import CACHE, KEYS_VALUES
from moe_reduce.models.decoder import STACK, Decoder, joined
from moe_reduce.models.deltas import variables


class Output(NamedTuple):
    """Result of `Model.apply`: fp32 logits [B, T, V], and the collected values by name."""

    logits_BTV: jax.Array
    collected: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Model:
    """Configuration, parameters, execution settings and origin. Immutable: transforms return a new model."""

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

    def with_params(self, params: dict[str, Any]) -> "Model":
        """The same model with other parameters, such as traced ones inside a loss."""
        return dataclasses.replace(self, params=params)

    def apply(
        self, batch: Mapping[str, Any], collect: Sequence[str] = (), cache: Mapping[str, Any] | None = None
    ) -> Output:
        """Run the decoder on a batch, inside or outside jit.

        batch: `tokens` int32 [B, T]; optional `segments` [B, T] (new tokens attend within a segment), `positions`
        [B, T], `weights` [B, T] (tokens after a row's last weight above 0 are padding, excluded from router
        statistics), `last` [B] (one position of each row: logits are then [B, 1, V], of that position only), `noise`
        [B, T, D] (added to the embedded tokens), and, if and only if a bank of adapters is active, `adapter` int32 [B]
        (the bank's entry of each row).
        collect: names among COLLECT. Each is stacked over the layers that have it, [N, …]; only layers with experts
            have routing, assignments and router_input:
            routing      counts_E, probability_E, z and dropped of each layer's router call
            assignments  expert, weight, and norm, maximum and largest of the expert's output, [N, B, T, A]
            hidden       block_input, router_input, block_output, [N, B, T, D]
            keys_values  keys and values of the batch's tokens, as models/cache.py stores them
        cache: keys and values of earlier tokens. A row that has p of them starts at position p; if it has several
            segments, each continues these tokens and starts at p.
        """
        variable = variables(self.params, batch.get("adapter"))
        if cache is not None:
            variable |= {CACHE: cache}
        decoder = Decoder(self.config, self.execution, STACK in self.params)
        inputs: Any = {name: batch.get(name) for name in ("segments", "positions", "last", "noise")}
        run = functools.partial(decoder.apply, variable, batch["tokens"], real_BT=_real(batch), **inputs)
        if not collect:
            logits_BTV: Any = run()
            return Output(logits_BTV, {})
        found: Any = run(mutable=list(collect))
        logits_BTV, sown = found
        unwrapped = {name: sown[name] if name == KEYS_VALUES else joined(sown[name]) for name in collect}
        return Output(logits_BTV, unwrapped)


def _real(batch: Mapping[str, Any]) -> jax.Array | None:
    """Mask of real tokens: False after a row's last weight above 0, where it is padded. None without weights."""
    if "weights" not in batch:
        return None
    return jax.lax.cummax(jnp.asarray(batch["weights"]), axis=1, reverse=True) > 0


def _checked(tokens_BT: np.ndarray, vocab_size: int) -> np.ndarray:
    # Inside jit an out-of-range id would silently read another row of the table.
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu" or tokens_BT.size == 0:
        raise UserError(f"tokens must be integers [B, T], got {tokens_BT.dtype} {tokens_BT.shape}")
    if tokens_BT.min() < 0 or tokens_BT.max() >= vocab_size:
        raise UserError(f"token ids must be in 0..{vocab_size - 1}, got {tokens_BT.min()}..{tokens_BT.max()}")
    return tokens_BT


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: ModelConfig, execution: ExecutionConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    return Model(config, params, execution).apply({"tokens": tokens_BT}).logits_BTV
