"""BERT encoders (arXiv:1810.04805) in JAX, read from a directory of transformers with config.json and safetensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_reduce.core.errors import UserError
from moe_reduce.core.json_files import read_object
from moe_reduce.storage.tensors import TensorFiles

ARCHITECTURE = "BertModel"
SUPPORTED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
PREFIX = "bert."  # before the names of a BertModel that is part of a larger model
Weights = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Bert:
    """Sizes of a BERT encoder."""

    width: int
    layers: int
    heads: int
    positions: int
    epsilon: float


def readable(directory: Path) -> bool:
    """True if the directory describes a BertModel."""
    return ARCHITECTURE in (read_object(directory / "config.json").get("architectures") or ())


def read(directory: Path) -> tuple[Bert, Weights]:
    """Sizes and fp32 weights. Raises UserError for a kind of BERT that this module does not compute."""
    raw = read_object(directory / "config.json")
    for key, value in SUPPORTED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{directory / 'config.json'}: {key}={raw[key]!r} is not supported: choose {value!r}")
    try:
        width, layers, heads, positions = (int(raw[key]) for key in SIZES)
        epsilon = float(raw.get("layer_norm_eps", 1e-12))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'} lacks a size of BERT ({error}): fetch it again") from None
    files = TensorFiles(directory)
    weights = {
        name.removeprefix(PREFIX): jnp.asarray(files.read(name), jnp.float32)
        for name in files.entries
        if not name.endswith("position_ids")
    }
    return Bert(width, layers, heads, positions, epsilon), weights


@partial(jax.jit, static_argnums=0)
def apply(bert: Bert, weights: Weights, ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Hidden states of the last layer, fp32 [B, T, D]. mask_BT: 1 for tokens, 0 for padding."""
    table = "embeddings.{}_embeddings.weight".format
    # batches are padded to a multiple, which may exceed the table: the last positions are padding
    positions_T = jnp.minimum(jnp.arange(ids_BT.shape[1]), bert.positions - 1)
    x_BTD = (
        weights[table("word")][ids_BT]
        + weights[table("position")][positions_T][None]
        + weights[table("token_type")][:1][None]  # one segment
    )
    x_BTD = _norm(bert, weights, "embeddings.LayerNorm", x_BTD)
    for layer in range(bert.layers):
        at = f"encoder.layer.{layer}"
        y_BTD = _attention(bert, weights, f"{at}.attention", x_BTD, mask_BT)
        x_BTD = _norm(bert, weights, f"{at}.attention.output.LayerNorm", x_BTD + y_BTD)
        h_BTF = jax.nn.gelu(_linear(weights, f"{at}.intermediate.dense", x_BTD), approximate=False)
        y_BTD = _linear(weights, f"{at}.output.dense", h_BTF)
        x_BTD = _norm(bert, weights, f"{at}.output.LayerNorm", x_BTD + y_BTD)
    return x_BTD


def _attention(bert: Bert, weights: Weights, at: str, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    def heads(name: str) -> jax.Array:
        y_BTD = _linear(weights, f"{at}.self.{name}", x_BTD)
        return y_BTD.reshape(*y_BTD.shape[:2], bert.heads, bert.width // bert.heads)

    bias_BHTT = jnp.where(mask_BT > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
    y_BTHC = jax.nn.dot_product_attention(heads("query"), heads("key"), heads("value"), bias=bias_BHTT)
    return _linear(weights, f"{at}.output.dense", y_BTHC.reshape(x_BTD.shape))


def _linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    y: Any = jnp.einsum("...I,OI->...O", x, weights[f"{name}.weight"], precision=jax.lax.Precision.HIGHEST)
    return y + weights[f"{name}.bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def _norm(bert: Bert, weights: Weights, name: str, x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    scale, bias = (weights[f"{name}.{part}"].reshape((1,) * (x.ndim - 1) + (-1,)) for part in ("weight", "bias"))
    return (x - mean) * jax.lax.rsqrt(variance + bert.epsilon) * scale + bias
