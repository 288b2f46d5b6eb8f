"""Routers: logits -> chosen experts, their combine weights, and the statistics that balancing and reports need."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.core.config import MoEConfig
from moe_reduce.models.weights import Weight, matmul

MANY = 2048  # with this number of experts or more, ranking by groups is faster


class RouterWeights(NamedTuple):
    """Weights of a layer's router: matrix [D, E], selection bias [E], a scalar offset and a bias [E] of the logits."""

    weight: Weight
    bias_E: jax.Array | None = None
    offset: jax.Array | None = None
    logit_bias_E: jax.Array | None = None

    def logits(self, x_SD: jax.Array) -> jax.Array:
        """fp32 logits [S, E], plus their bias and minus the offset."""
        logits_SE = matmul(x_SD, self.weight)
        if self.logit_bias_E is not None:
            logits_SE = logits_SE + self.logit_bias_E[None].astype(logits_SE.dtype)
        return logits_SE if self.offset is None else logits_SE - self.offset


class Routing(NamedTuple):
    """Result of one call of a router for S tokens and E experts; floats are fp32."""

    experts_SA: jax.Array  # int32, the chosen experts
    weights_SA: jax.Array  # combine weights
    # statistics of real tokens:
    counts_E: jax.Array  # assignments by expert
    probability_E: jax.Array  # mean routing probability by expert
    z: jax.Array  # mean squared logsumexp of the logits (ST-MoE, arXiv:2202.08906)

    def statistics(self) -> dict[str, jax.Array]:
        """Statistics of the call, by name."""
        return {name: getattr(self, name) for name in ("counts_E", "probability_E", "z")}


def route(
    logits_SE: jax.Array, bias_E: jax.Array | None, config: MoEConfig, real_S: jax.Array | None = None
) -> Routing:
    """The top A experts of each token, and their combine weights.

    bias_E affects which experts are chosen; only where config.bias_on says so does it change weights as well. Added to
    the logits, it suits both score functions by its scale (arXiv:2408.15664 adds it to the scores); scores grow with
    logits, so they would give the same ranking. It gets no gradient. real_S: False for padding, which would dominate
    the statistics of short texts; None counts every token.
    """
    bias_1E = None if bias_E is None else jax.lax.stop_gradient(bias_E)[None, :].astype(logits_SE.dtype)
    if bias_1E is not None and config.bias_on == "logits":
        logits_SE, bias_1E = logits_SE + bias_1E, None
    ranking_SE = jax.lax.stop_gradient(_ranking(logits_SE, bias_1E, config))
    experts_SA = top_experts(ranking_SE, config.active)
    # scores of the chosen experts only: with thousands of experts, a pass over [S, E] costs as much as top_k
    largest_S1 = jax.lax.stop_gradient(jnp.max(logits_SE, axis=1, keepdims=True))
    shifted_SE = logits_SE - largest_S1
    total_S1 = jnp.log(jnp.sum(jnp.exp(shifted_SE), axis=1, keepdims=True))
    if config.score_function == "softmax":
        chosen_SA = jnp.take_along_axis(shifted_SE, experts_SA, axis=1) - total_S1
        probability_SE = jnp.exp(shifted_SE - total_S1)
    else:
        chosen_SA = jax.nn.log_sigmoid(jnp.take_along_axis(logits_SE, experts_SA, axis=1))
        probability_SE = jax.nn.softmax(jax.nn.log_sigmoid(logits_SE))
    # softmax(log s) = s / Σ s, without forming scores s, which may underflow
    weights_SA = jax.nn.softmax(chosen_SA) if config.normalize else jnp.exp(chosen_SA)
    return Routing(
        experts_SA=experts_SA,
        weights_SA=weights_SA if config.weight_scale == 1 else weights_SA * config.weight_scale,
        counts_E=_counts(only_real(experts_SA, real_S, config.experts), config.experts),
        probability_E=_mean(probability_SE, real_S),
        z=_mean(jnp.square(largest_S1 + total_S1), real_S)[0],
    )


def _ranking(logits_SE: jax.Array, bias_1E: jax.Array | None, config: MoEConfig) -> jax.Array:
    """Numbers whose order is that of the experts, -inf in groups that are not chosen."""
    ranking_SE = logits_SE
    if config.bias_on == "scores_of_choice" or (config.groups > 1 and config.group_score == "best_two"):
        softmax = config.score_function == "softmax"
        ranking_SE = jax.nn.softmax(logits_SE) if softmax else jax.nn.sigmoid(logits_SE)
    if bias_1E is not None:
        ranking_SE = ranking_SE + bias_1E
    return ranking_SE if config.groups == 1 else _in_best_groups(ranking_SE, config)


def _in_best_groups(ranking_SE: jax.Array, config: MoEConfig) -> jax.Array:
    """The ranking in each token's best groups, and -inf in the others (arXiv:2405.04434)."""
    tokens, experts = ranking_SE.shape
    ranking_SGE = ranking_SE.reshape(tokens, config.groups, -1)
    best = jax.lax.top_k(ranking_SGE, 1 if config.group_score == "maximum" else 2)[0]
    chosen_SX = jax.lax.top_k(jnp.sum(best, axis=2), config.active_groups)[1]
    numbers_G = jnp.arange(config.groups, dtype=chosen_SX.dtype)
    open_SG = jnp.any(chosen_SX[:, :, None] == numbers_G[None, None], axis=1)
    return jnp.where(open_SG[:, :, None], ranking_SGE, -jnp.inf).reshape(tokens, experts)


def only_real(experts_SA: jax.Array, real_S: jax.Array | None, experts: int) -> jax.Array:
    """Chosen experts, with E (no expert) for padding tokens."""
    return experts_SA if real_S is None else jnp.where(real_S[:, None], experts_SA, experts)


def _mean(values_SI: jax.Array, real_S: jax.Array | None) -> jax.Array:
    """Mean over the real tokens; 0 if there are none."""
    if real_S is None:
        return jnp.mean(values_SI, axis=0)
    return jnp.sum(jnp.where(real_S[:, None], values_SI, 0), axis=0) / jnp.maximum(
        jnp.sum(real_S, dtype=values_SI.dtype), 1
    )


def top_experts(ranking_SE: jax.Array, active: int) -> jax.Array:
    """Indices of the A highest of each row, int32 [S, A], in the order of jax.lax.top_k.

    From MANY experts on, only the A groups with the highest maxima are ranked: these contain the top A experts.
    """
    tokens, experts = ranking_SE.shape
    group = next((size for size in (32, 16, 8) if experts % size == 0), experts)
    if experts < MANY or experts // group < active:
        return jax.lax.top_k(ranking_SE, active)[1]
    ranking_SGE = ranking_SE.reshape(tokens, -1, group)
    groups_SA = jnp.sort(jax.lax.top_k(jnp.max(ranking_SGE, axis=2), active)[1], axis=1)
    candidates = jnp.take_along_axis(ranking_SGE, groups_SA[:, :, None], axis=1).reshape(tokens, -1)
    numbers = (groups_SA[:, :, None] * group + jnp.arange(group, dtype=groups_SA.dtype)[None, None, :]).reshape(
        tokens, -1
    )
    return jnp.take_along_axis(numbers, jax.lax.top_k(candidates, active)[1], axis=1)


def _counts(experts_SA: jax.Array, experts: int) -> jax.Array:
    """Assignments by expert. Up to 64 experts are counted by comparisons: a GPU's atomic additions would collide."""
    if experts > 64:
        return jnp.zeros(experts).at[experts_SA.reshape(-1)].add(1.0)
    numbers_E = jnp.arange(experts, dtype=experts_SA.dtype)
    return jnp.sum((experts_SA[:, :, None] == numbers_E[None, None, :]).astype(jnp.float32), axis=(0, 1))
