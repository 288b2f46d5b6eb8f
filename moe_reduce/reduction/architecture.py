"""Exact or data-light reductions of the architecture: heads, layers, the embedding, single weights, neurons.

Each is a pure function Model -> Model that takes real or abstract leaves (jax.ShapeDtypeStruct), so that it can be
planned without a weight. Letters as in moe_reduce.models; I and O are the inputs and outputs of any matrix, M counts
matrices. Arithmetic is in fp32, results in the dtype of their leaf.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import abstract_params
from moe_reduce.training.task import Batch

FEED_FORWARD = r"(layers/)?(mlp|experts)/(gate|up|down)"
MATRICES = rf"layers/attention/(query|key|value|output)|{FEED_FORWARD}"


def matrix_leaves(config: ModelConfig) -> int:
    """Number of leaves that MATRICES matches: of attention, and of the feed-forward blocks or experts."""
    return 4 + feed_forward_leaves(config)


def feed_forward_leaves(config: ModelConfig) -> int:
    """Number of leaves that FEED_FORWARD matches: a GELU block has no gate."""
    return 3 if config.feed_forward == "swiglu" else 2


def group_heads(model: Model, key_value_heads: int) -> Model:
    """Fewer key/value heads: those of a group become their mean (GQA, arXiv:2305.13245).

    Exact when the heads within a group are equal. Touches 2 leaves, 4 with biases, 1 more where keys are normalised
    over their whole projection. Raises UserError unless `key_value_heads` divides their number now.
    """
    present = model.config.key_value_heads
    if key_value_heads < 1 or present % key_value_heads:
        fitting = ", ".join(str(number) for number in range(1, present + 1) if present % number == 0)
        raise UserError(f"key_value_heads={key_value_heads} does not divide the model's {present}: give {fitting}")

    whole_norm = model.config.qk_norm and model.config.qk_norm_scope == "projection"

    def mean(heads: jax.Array) -> jax.Array:  # matrices [N, D, G, C], biases or scales [N, G, C]
        groups = heads.astype(jnp.float32).reshape(*heads.shape[:-2], key_value_heads, -1, heads.shape[-1])
        first = groups[..., :1, :]
        # around the first head: equal heads give exactly that head, whatever their number
        return (first + jnp.mean(groups - first, axis=-2, keepdims=True))[..., 0, :].astype(heads.dtype)

    expect = (4 if model.config.biases else 2) + whole_norm
    norm = "|layers/attention/key_norm/scale" if whole_norm else ""
    found = trees.select(model.params, f"layers/attention/(key|value)(_bias)?{norm}", expect=expect)
    leaves = {path: _computed(mean, leaf) for path, leaf in found.items()}
    return _changed(model, leaves, key_value_heads=key_value_heads)


def drop_layers(model: Model, layers: Sequence[int]) -> Model:
    """Without the layers of these numbers, from 0. Touches every leaf below layers/; a shared pool stays whole.

    Raises UserError when a number is out of range or repeated, or no layer would remain.
    """
    total = model.config.layers
    for layer in layers:
        if not 0 <= layer < total:
            raise UserError(f"layers: {layer} is not in 0..{total - 1}, the layers of this model: name others")
    if len(set(layers)) < len(layers):
        raise UserError(f"layers={list(layers)} names one twice: name each layer once")
    if len(layers) == total:
        raise UserError(f"layers names all {total} layers: leave at least one")
    kept = np.array([layer for layer in range(total) if layer not in layers])
    below = len(trees.flatten(abstract_params(model.config)["layers"]))
    found = trees.select(model.params, "layers/.*", expect=below)
    leaves = {path: _computed(lambda leaf: leaf[kept], leaf) for path, leaf in found.items()}
    return _changed(model, leaves, layers=len(kept))


def block_influence(model: Model, batches: Iterable[Batch]) -> np.ndarray:
    """BI_l = 1 − E[cos(x_l, x_{l+1})], float64 [N], over the counted positions (ShortGPT, arXiv:2403.03853).

    x_l is what block l reads, x_{l+1} what it leaves in the residual stream, for the last block before the final norm.
    0: the block turns no hidden state. Raises UserError without a counted position.
    """

    @jax.jit
    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden = model.with_params(params).apply(batch, collect=("hidden",)).collected["hidden"]
        cosine_NBT = _cosine(hidden["block_input"], hidden["block_output"])
        weights_BT = jnp.asarray(batch["weights"])
        return jnp.einsum("NBT,BT->N", cosine_NBT, weights_BT), jnp.sum(weights_BT)

    cosine_N, weight = np.zeros(model.config.layers), 0.0
    for batch in batches:
        added_N, added = jax.device_get(sums(model.params, batch))
        cosine_N, weight = cosine_N + np.asarray(added_N, np.float64), weight + float(added)
    if weight == 0:
        raise UserError("data holds no position to measure Block Influence on: give more text")
    return 1 - cosine_N / weight


def factorise_embedding(model: Model, inner: int) -> Model:
    """The tied table [V, D] as factor [V, K] · projection [K, D], K = `inner`, by truncated SVD. Touches 1 leaf.

    The nearest of its rank, and exact when K reaches the rank of the table. The projection keeps lengths on average, as
    at initialisation (ALBERT, arXiv:1909.11942). Raises UserError for an untied or factorised model, or an unfit K.
    """
    config = model.config
    if not config.tied_embeddings:
        raise UserError("tied_embeddings is False, and the factors serve both ends: give a model with a tied embedding")
    if config.embedding_factor is not None:
        raise UserError(f"the embedding is factorised already (embedding_factor={config.embedding_factor}): leave it")
    largest = min(config.vocab_size, config.width)
    if not 1 <= inner <= largest:
        raise UserError(f"inner={inner} is not in 1..{largest}, the ranks of the embedding: choose one of these")

    def factors(table_VD: jax.Array) -> dict[str, jax.Array]:
        left, singular, right = jnp.linalg.svd(table_VD.astype(jnp.float32), full_matrices=False)
        gain = (config.width / inner) ** 0.5  # of the projection over orthonormal rows
        factor_VK = left[:, :inner] * (singular[None, :inner] / gain)
        projection_KD = right[:inner] * gain
        return {"factor": factor_VK.astype(table_VD.dtype), "projection": projection_KD.astype(table_VD.dtype)}

    (table_VD,) = trees.select(model.params, "embedding/table", expect=1).values()
    params = model.params | {"embedding": _computed(factors, table_VD)}
    return dataclasses.replace(model, config=dataclasses.replace(config, embedding_factor=inner), params=params)


def prune_magnitude(model: Model, share: float) -> Model:
    """Zero in place of the ⌊share · n⌋ smallest |w| of each matrix of n weights, the first of equals.

    Attention, feed-forward and expert matrices, each by itself; never embeddings, norms, routers or biases. Zeros that
    are there already count. Touches 7 leaves, 6 where a feed-forward block has no gate. Raises
    UserError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise UserError(f"share={share} must be at least 0 and below 1: it is the share of the weights set to zero")

    def prune(w_IO: jax.Array) -> jax.Array:
        count = int(Decimal(str(share)) * w_IO.size)  # of the number as it was written: 0.29 · 100 is 29
        smallest = jnp.argsort(jnp.abs(w_IO).reshape(-1), stable=True)[:count]
        return w_IO.reshape(-1).at[smallest].set(0, unique_indices=True).reshape(w_IO.shape)

    found = trees.select(model.params, MATRICES, expect=matrix_leaves(model.config))
    return _changed(model, {path: _each_matrix(prune, path, leaf) for path, leaf in found.items()})


def prune_two_four(model: Model) -> Model:
    """Of each 4 weights that follow each other along the inputs of a matrix, the 2 largest |w|.

    The 2:4 pattern that sparse tensor cores read (arXiv:2104.08378), in the matrices of `prune_magnitude`; of equals
    the last stay. Touches as many leaves. Raises UserError when a matrix has a number of inputs that 4 does not divide.
    """

    def prune(w_IO: jax.Array) -> jax.Array:
        quads = w_IO.reshape(-1, 4, w_IO.shape[1])
        rank = jnp.argsort(jnp.argsort(jnp.abs(quads), axis=1, stable=True), axis=1)
        return jnp.where(rank >= 2, quads, 0).reshape(w_IO.shape)

    found = trees.select(model.params, MATRICES, expect=matrix_leaves(model.config))
    for path, leaf in found.items():
        inputs, _ = _matrix_sizes(path, leaf.shape)
        if inputs % 4:
            raise UserError(f"{path} has {inputs} inputs, which 4 does not divide: prune by share instead of 2:4")
    return _changed(model, {path: _each_matrix(prune, path, leaf) for path, leaf in found.items()})


def prune_neurons(model: Model, keep: int) -> Model:
    """The `keep` neurons of largest ‖gate_f‖·‖up_f‖·‖down_f‖ in each layer, or each expert.

    That product times ‖x‖² bounds what neuron f can add, since |silu(z)| <= |z|; with GELU there is no gate, and the
    factor is ‖x‖. A bias counts as the weight of an input that is always 1. Neurons stay in their order, so that
    keeping all is the identity. Touches the leaves of FEED_FORWARD and the biases of neurons. Raises UserError when
    `keep` is not in 1..F.
    """
    moe = model.config.moe
    width = model.config.feed_forward_width if moe is None else moe.width
    assert width is not None, "a dense model has a feed_forward_width"
    if not 1 <= keep <= width:
        raise UserError(f"keep={keep} is not in 1..{width}, the neurons of a feed-forward block: choose one of these")

    found = trees.select(model.params, FEED_FORWARD, expect=feed_forward_leaves(model.config))
    if model.config.biases:
        found |= trees.select(model.params, "layers/mlp/(gate|up)_bias", expect=len(found) - 1)
    leaves = dict(zip(found, _computed(_kept_neurons(list(found), keep), *found.values()), strict=True))
    if moe is None:
        return _changed(model, leaves, feed_forward_width=keep)
    return _changed(model, leaves, moe=dataclasses.replace(moe, width=keep))


def _kept_neurons(paths: list[str], keep: int) -> Callable[..., list[jax.Array]]:
    """A function of the leaves at these paths of one feed-forward block, to the same leaves with fewer neurons."""
    names = [path.split("/")[-1] for path in paths]

    def prune(*leaves: jax.Array) -> list[jax.Array]:
        named = dict(zip(names, leaves, strict=True))
        size = _norm(named["down"], -1)
        for name in ("gate", "up"):
            if f"{name}_bias" in named:
                size *= _norm(jnp.concatenate([named[name], named[f"{name}_bias"][..., None, :]], axis=-2), -2)
            elif name in named:
                size *= _norm(named[name], -2)
        kept = jnp.sort(jax.lax.top_k(size, keep)[1], axis=-1)
        return [_taken(leaf, kept, -2 if name == "down" else -1) for name, leaf in named.items()]

    return prune


def _taken(leaf: jax.Array, kept: jax.Array, axis: int) -> jax.Array:
    """The kept indices [..., K] along an axis of a leaf; a bias has as many axes as `kept`."""
    if leaf.ndim > kept.ndim:
        kept = jnp.expand_dims(kept, -1 if axis == -2 else -2)
    return jnp.take_along_axis(leaf, kept, axis=axis)


def _changed(model: Model, leaves: dict[str, Any], **config: Any) -> Model:
    """The model with these leaves and fields of its configuration replaced."""
    changed: ModelConfig = dataclasses.replace(model.config, **config)
    return dataclasses.replace(model, config=changed, params=trees.update(model.params, leaves))


def _computed(function: Callable[..., Any], *leaves: Any) -> Any:
    """function(*leaves); of abstract leaves only the shapes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(function, *leaves)
    return function(*map(jnp.asarray, leaves))


def _matrix_sizes(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(I, O) of the matrices that are stacked in a leaf; heads and head width are one axis."""
    if path.endswith("attention/output"):
        return shape[-3] * shape[-2], shape[-1]
    if "attention/" in path:
        return shape[-3], shape[-2] * shape[-1]
    return shape[-2], shape[-1]


def _each_matrix(function: Callable[[jax.Array], jax.Array], path: str, leaf: Any) -> Any:
    """function(w_IO) -> w_IO on every matrix of a leaf, one after the other: sorting needs memory beside it."""

    def apply(leaf: jax.Array) -> jax.Array:
        w_MIO = leaf.reshape(-1, *_matrix_sizes(path, leaf.shape))
        return jax.lax.map(function, w_MIO).reshape(leaf.shape)

    return _computed(apply, leaf)


def _norm(x: jax.Array, axis: int) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=axis)


def _cosine(left: jax.Array, right: jax.Array) -> jax.Array:
    """Of the vectors on the last axis, fp32; 0 where one of them is zero."""
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    lengths = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
    return jnp.sum(left * right, axis=-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
