"""Sampling the next token of each row from fp32 logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.core.config import GenerateConfig

LEAST_TEMPERATURE = 1e-5  # below it, quotients of fp32 logits overflow or say nothing: the most probable token is taken


class Sampler(NamedTuple):
    """Static (compile-time) sampling settings."""

    greedy: bool
    candidates: int | None  # draw among this many most probable tokens, sorted; None: among all, unsorted
    nucleus: bool

    @classmethod
    def of(cls, settings: GenerateConfig, vocab_size: int) -> "Sampler":
        """Static part of `settings`."""
        if settings.temperature < LEAST_TEMPERATURE:
            return cls(True, None, False)
        nucleus = settings.top_p < 1
        wanted = vocab_size if settings.top_k is None else min(settings.top_k, vocab_size)
        return cls(False, wanted if nucleus or settings.top_k is not None else None, nucleus)


class Choice(NamedTuple):
    """Sampling settings that may change without recompiling."""

    temperature: jax.Array
    top_p: jax.Array
    key: jax.Array
    end_ids: jax.Array  # int32, any length


def choose(logits_BV: jax.Array, sampler: Sampler, choice: Choice, step: jax.Array) -> jax.Array:
    """Choose a token for each row, int32 [B].

    Each row draws from its own key, derived from row and step, so that draws do not depend on how many steps one call
    makes. Order of the filters as in transformers: temperature, top-k, then top-p among those (arXiv:1904.09751).
    """
    if sampler.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    rows_B = jnp.arange(logits_BV.shape[0])
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(choice.key, row), step))(rows_B)
    scaled_BV = logits_BV / choice.temperature
    if sampler.candidates is None:
        return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)
    scaled_BK, ids_BK = jax.lax.top_k(scaled_BV, sampler.candidates)
    if sampler.nucleus:
        shares_BK = jax.nn.softmax(scaled_BK)
        before_BK = jnp.cumsum(shares_BK, axis=-1) - shares_BK
        scaled_BK = jnp.where(before_BK < choice.top_p, scaled_BK, -jnp.inf)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BK)
    return jnp.take_along_axis(ids_BK, drawn_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
