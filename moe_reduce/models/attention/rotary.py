"""Rotary position embedding (arXiv:2104.09864); channel i pairs with i + width / 2, as in Hugging Face LLaMA."""

import jax
import jax.numpy as jnp

from moe_reduce.models import products

Angles = tuple[jax.Array, jax.Array]


def angles(positions_BT: jax.Array, width: int, theta: float, stored: bool = False) -> Angles:
    """(sine, cosine) of the angles of `width` channels, fp32 [B, T, 1, width / 2] each.

    stored: True keeps the angles in memory; otherwise XLA on CPU recomputes them for each head (rotating
    [4, 256, 12, 64] takes 1.9 ms instead of 0.3 ms).
    """
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    turned = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    sine, cosine = jnp.sin(turned), jnp.cos(turned)
    return (products.row_major(sine), products.row_major(cosine)) if stored else (sine, cosine)


def rotate(x_BTHC: jax.Array, by: Angles) -> jax.Array:
    """x with the first channels rotated in fp32, as many as `by` covers; the others stay unchanged (GPT-NeoX)."""
    sine, cosine = by
    width = 2 * sine.shape[-1]
    if width < x_BTHC.shape[-1]:
        return jnp.concatenate([rotate(x_BTHC[..., :width], by), x_BTHC[..., width:]], axis=-1)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTHC.dtype)
