"""Second moments of the inputs of a layer's matrices over calibration text, which GPTQ and AWQ read.

They are sums over tokens of weight above 0. An expert's are over the tokens that are routed to it, and no others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models.decoder import AttentionHalf, Block, Shared
from moe_reduce.models.parameters import Parameter, record_in_module
from moe_reduce.models.weights import INPUTS

SMALLEST_BUCKET = 64  # rows of an expert are filled up to a power of two, so that few programs are compiled


class Moments(NamedTuple):
    """Sums over the inputs x of a matrix."""

    hessian_II: jax.Array  # Σ x xᵀ, fp32
    size_I: jax.Array  # Σ |x|, fp32
    rows: jax.Array  # number of inputs, fp32

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        return Moments(*(left + right for left, right in zip(self, other, strict=True)))

    def scaled(self, scale_I: jax.Array) -> "Moments":
        """Moments of the inputs divided by scales."""
        both_II = scale_I[:, None] * scale_I[None]
        return Moments(self.hessian_II / both_II, self.size_I / scale_I, self.rows)

    @property
    def mean_size_I(self) -> jax.Array:
        """Mean |x| of each input."""
        return self.size_I / jnp.maximum(self.rows, 1.0)


def moments(rows_RI: jax.Array, counted_R: jax.Array) -> Moments:
    """Moments of some rows; counted_R: 1.0 where a row counts, else 0.0."""
    rows_RI = rows_RI.astype(jnp.float32) * counted_R[:, None]
    hessian_II = jnp.matmul(rows_RI.T, rows_RI, precision=jax.lax.Precision.HIGHEST)
    return Moments(hessian_II, jnp.sum(jnp.abs(rows_RI), axis=0), jnp.sum(counted_R))


def source_of(record: Parameter) -> str:
    """Name of what a matrix reads: matrices of one module that contract the same axes read the same inputs."""
    return f"{record.path.rpartition('/')[0]} {record.inputs}"


def layer_moments(
    config: ModelConfig, execution: ExecutionConfig, params: Any, states: Sequence[Any], weights: Sequence[Any]
) -> dict[str, Moments]:
    """Moments of a layer's attention and, in a dense model, of its feed-forward block, by `source_of` the matrices.

    params: the layer's. states: the residual stream before the layer, [B, T, D] of each batch. weights: [B, T] of each.
    """
    total: dict[str, Moments] | None = None
    for x_BTD, weights_BT in zip(states, weights, strict=True):
        found = _sums(config, execution, params, x_BTD, weights_BT)
        total = found if total is None else {name: total[name] + found[name] for name in found}
    assert total is not None
    return total


@partial(jax.jit, static_argnums=(0, 1))
def _sums(config: ModelConfig, execution: ExecutionConfig, params: Any, x_BTD: jax.Array, weights_BT: jax.Array):
    positions_BT = positions(x_BTD)
    if config.moe is None:
        block: Any = Block(config, execution)
        _, sown = block.apply({"params": params}, (x_BTD, ()), positions_BT, None, Shared(), mutable=[INPUTS])
    else:
        half: Any = AttentionHalf(config, execution)
        _, sown = half.apply({"params": params}, x_BTD, positions_BT, mutable=[INPUTS])
    counted_R = (weights_BT.reshape(-1) > 0).astype(jnp.float32)
    found: dict[str, Moments] = {}
    for path, inputs in trees.flatten(sown[INPUTS]).items():
        *scope, name = path.split("/")
        source = source_of(record_in_module(config, tuple(scope), name))
        if source not in found:
            found[source] = moments(inputs.reshape(counted_R.shape[0], -1), counted_R)
    return found


def positions(x_BTD: jax.Array) -> jax.Array:
    """Positions of the tokens of whole rows, int32 [B, T]."""
    return jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None], x_BTD.shape[:2])


class RoutedRows:
    """Inputs of a layer's experts, from which the rows of one expert are taken at a time; held on the host."""

    def __init__(self, normed: Sequence[Any], chosen: Sequence[Any], weights: Sequence[Any]):
        """normed: [B, T, D] of each batch. chosen: expert of each assignment, [B, T, A]. weights: [B, T]."""
        self._rows_SD = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in normed])
        chosen_SA = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in chosen])
        counted_S = np.concatenate([np.asarray(x).reshape(-1) > 0 for x in weights])
        self._chosen_SA = np.where(counted_S[:, None], chosen_SA, -1)

    def count(self, expert: int) -> int:
        """Number of tokens that are routed to an expert."""
        return int(np.sum(np.any(self._chosen_SA == expert, axis=1)))

    def of(self, expert: int) -> tuple[jax.Array, jax.Array]:
        """(inputs of an expert [R, D] with rows of zeros behind them, 1.0 where a row is an input [R])."""
        places = np.flatnonzero(np.any(self._chosen_SA == expert, axis=1))
        size = max(SMALLEST_BUCKET, 1 << max(len(places) - 1, 0).bit_length())
        rows_RD = np.zeros((size, self._rows_SD.shape[1]), self._rows_SD.dtype)
        rows_RD[: len(places)] = self._rows_SD[places]
        return jnp.asarray(rows_RD), jnp.asarray((np.arange(size) < len(places)).astype(np.float32))


expert_moments = jax.jit(moments)


@jax.jit
def hidden_rows(rows_RD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    """Inputs of an expert's down matrix, silu(gate·x) · up·x, [R, F] in the dtype of the rows."""
    gate_RF, up_RF = (jnp.matmul(rows_RD, matrix.astype(rows_RD.dtype)) for matrix in (gate_DF, up_DF))
    return jax.nn.silu(gate_RF) * up_RF
