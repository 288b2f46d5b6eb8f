"""Distillation: the divergence of a student's next-token distribution from a teacher's, live or stored.

A live teacher is a second model whose frozen parameters a task finds below TEACHER. A stored one is in the batch:

    teacher_ids                int32 [B, T, K], the K most probable next tokens
    teacher_log_probabilities  float16 [B, T, K], their log probabilities at the temperature of the run

Source: Hinton, Vinyals and Dean, arXiv:1503.02531.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_reduce.core.config import DistillConfig
from moe_reduce.data.teacher_logits import IDS, LARGEST, LOG_PROBABILITIES
from moe_reduce.models.model import Model
from moe_reduce.training.task import Batch, Params


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation, and its teacher without parameters; None where the batch holds its distribution."""

    config: DistillConfig
    teacher: Model | None

    def divergence(self, params: Params, logits_BTV: jax.Array, batch: Batch) -> jax.Array:
        """Mean KL(teacher ‖ student) at the temperature, nats a token. params: the teacher's, {} if it is stored."""
        temperature = self.config.temperature
        found_BTV = tempered(logits_BTV, temperature)
        if self.teacher is None:
            return mean_stored_divergence(batch[IDS], batch[LOG_PROBABILITIES], found_BTV, batch)
        wanted_BTV, _ = self.teacher.with_params(params).apply(batch)
        return mean_divergence(jax.lax.stop_gradient(tempered(wanted_BTV, temperature)), found_BTV, batch)

    def mixed(self, nll: jax.Array, divergence: jax.Array) -> jax.Array:
        """Loss (1 − λ) · cross-entropy + λ · τ² · KL; τ² keeps the size of the gradient where τ changes."""
        weight, temperature = self.config.weight, self.config.temperature
        return (1 - weight) * nll + weight * temperature**2 * divergence


def tempered(logits: jax.Array, temperature: float) -> jax.Array:
    """Logits divided by a temperature."""
    return logits if temperature == 1.0 else logits / temperature


def mean_divergence(wanted_BTV: jax.Array, found_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Mean KL(wanted ‖ found) of the distributions of logits at the counted targets, nats a token."""
    wanted_BTV, found_BTV = jax.nn.log_softmax(wanted_BTV), jax.nn.log_softmax(found_BTV)
    divergence_BT = jnp.sum(jnp.exp(wanted_BTV) * (wanted_BTV - found_BTV), axis=-1)
    return _mean(divergence_BT, batch)


def most_probable(logits_BTV: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(ids int32, log probabilities float16) of the LARGEST most probable tokens, or of all V, [B, T, K]."""
    values_BTK, ids_BTK = jax.lax.top_k(
        jax.nn.log_softmax(tempered(logits_BTV, temperature)), min(LARGEST, logits_BTV.shape[-1])
    )
    return ids_BTK.astype(jnp.int32), values_BTK.astype(jnp.float16)


def mean_stored_divergence(
    ids_BTK: jax.Array, log_probabilities_BTK: jax.Array, logits_BTV: jax.Array, batch: Batch
) -> jax.Array:
    """Mean KL(teacher ‖ student) with every token beyond the stored K in one bucket, nats a token.

    At most the divergence of the whole distributions, and equal to it where their ratio is constant in the bucket.
    Stored probabilities are scaled down to a sum of 1 where float16 rounded their sum above it. logits_BTV: the
    student's, at the temperature of the stored probabilities.
    """
    wanted_BTK = log_probabilities_BTK.astype(jnp.float32)
    wanted_BTK = wanted_BTK - jnp.log(jnp.maximum(jnp.sum(jnp.exp(wanted_BTK), axis=-1, keepdims=True), 1.0))
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    found_BTK = jnp.take_along_axis(logits_BTV, ids_BTK, axis=-1) - total_BT[..., None]
    divergence_BT = jnp.sum(jnp.exp(wanted_BTK) * (wanted_BTK - found_BTK), axis=-1)
    if ids_BTK.shape[-1] < logits_BTV.shape[-1]:
        rest_BT = 1.0 - jnp.sum(jnp.exp(wanted_BTK), axis=-1)
        # a sum over the other tokens, because 1 minus the sum of the stored ones would cancel
        others_BTV = jnp.put_along_axis(logits_BTV, ids_BTK, -jnp.inf, axis=-1, inplace=False)
        found_rest_BT = jax.nn.logsumexp(others_BTV, axis=-1) - total_BT
        held_BT = jnp.where(rest_BT > 0, rest_BT, 1.0)
        divergence_BT += jnp.where(rest_BT > 0, rest_BT * (jnp.log(held_BT) - found_rest_BT), 0.0)
    return _mean(divergence_BT, batch)


def _mean(values_BT: jax.Array, batch: Batch) -> jax.Array:
    return jnp.sum(values_BT * batch["weights"]) / jnp.maximum(jnp.sum(batch["weights"]), 1.0)
