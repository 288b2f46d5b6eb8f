"""A per-layer MoE -> one pool of N·E experts that every layer can call, without changing what the model computes.

Own work, from the algebra: expert e of layer l becomes expert l·E + e of the pool, G is the concatenation of the
layers' routers, and each layer owns a selection bias over the pool, 0 on its own slice and -c elsewhere. With softmax
scores renormalised over the chosen and c beyond any difference of logits, the pooled model computes the original
logits. With sigmoid scores each layer subtracts an offset t: for z far below t, σ(z - t) ≈ e^(z - t), so normalised
gates approach the softmax gates with a relative error of about e^(max z - t). Training then lowers c towards 0.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model

Start = Literal["lossless", "concat", "random"]
# c of the lossless start: beyond any difference of logits, and small enough that a logit beside it keeps 0.001 in fp32
LOSSLESS_BIAS = 1e4
PROBES = 64  # random inputs that measure an expert's output size


def canonical(model: Model, seed: int = 0) -> Model:
    """The same function in a form where every expert maps an input of unit RMS to an output of comparable size.

    The scale of each layer's norm is folded into its router and its experts' input matrices; the mean output size of a
    layer's experts (RMS over random inputs of unit RMS) moves from `down` into the layer's output gain.
    """
    _check_layers(model.config)
    moe = _moe(model.config)
    flat = trees.flatten(model.params)
    scale_ND = flat["layers/mlp_norm/scale"].astype(jnp.float32)
    matrices = {name: flat[f"layers/experts/{name}"].astype(jnp.float32) for name in ("gate", "up", "down")}
    gate, up = (matrices[name] * scale_ND[:, None, :, None] for name in ("gate", "up"))
    size_N = _output_sizes(gate, up, matrices["down"], seed)
    gain_ND = jnp.broadcast_to(size_N[:, None], scale_ND.shape)
    if moe.output_gain:
        gain_ND = gain_ND * flat["layers/output_gain"].astype(jnp.float32)
    leaves = {
        "layers/mlp_norm/scale": jnp.ones_like(scale_ND),
        "layers/router/weight": flat["layers/router/weight"].astype(jnp.float32) * scale_ND[:, :, None],
        "layers/experts/gate": gate,
        "layers/experts/up": up,
        "layers/experts/down": matrices["down"] / size_N[:, None, None, None],
        "layers/output_gain": gain_ND,
    }
    dtypes = {path: flat[path].dtype if path in flat else scale_ND.dtype for path in leaves}
    params = trees.unflatten(flat | {path: leaf.astype(dtypes[path]) for path, leaf in leaves.items()})
    config = dataclasses.replace(model.config, moe=dataclasses.replace(moe, output_gain=True))
    return dataclasses.replace(model, config=config, params=params)


def _output_sizes(gate_NEDF, up_NEDF, down_NEFD, seed: int) -> jax.Array:
    """RMS of the outputs of each layer's experts on the same random inputs of unit RMS, [N]; one expert at a time."""
    x_PD = jax.random.normal(jax.random.key(seed), (PROBES, gate_NEDF.shape[2]), jnp.float32)
    x_PD = x_PD / jnp.sqrt(jnp.mean(jnp.square(x_PD), axis=-1, keepdims=True))

    def mean_square(matrices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        gate_DF, up_DF, down_FD = matrices
        return jnp.mean(jnp.square((jax.nn.silu(x_PD @ gate_DF) * (x_PD @ up_DF)) @ down_FD))

    def layer(matrices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.sqrt(jnp.mean(jax.lax.map(mean_square, matrices)))

    size_N = jax.lax.map(layer, (gate_NEDF, up_NEDF, down_NEFD))
    return jnp.where(size_N > 0, size_N, 1.0)


def pool(
    model: Model,
    start: Start = "lossless",
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    router: Literal["shared", "layer"] = "shared",
    bias: float | None = None,
    offset: float = 0.0,
    seed: int = 0,
) -> Model:
    """All experts in one pool; attention and norms stay in their layers.

    start: `lossless` (concatenated routers, foreign experts biased by -bias), `concat` (the same without a bias),
    `random` (a fresh router, no bias). bias: c in units of the logits; None: large enough to be exact. offset: t of the
    sigmoid scores, added to each layer's own. Raises UserError when the model has no per-layer experts, or when its
    weights are not renormalised over the chosen, which no pool can reproduce.
    """
    check_options(start, score_function, bias, offset)
    check_poolable(model.config)
    flat = trees.flatten(model.params)
    trees.select(model.params, r"layers/(experts/(gate|up|down)|router/weight)", expect=4)
    layers, _, experts = flat["layers/router/weight"].shape
    sizes = (experts,) * layers
    total = sum(sizes)
    fresh = {
        f"experts/{name}": flat[f"layers/experts/{name}"].reshape(total, *flat[f"layers/experts/{name}"].shape[2:])
        for name in ("gate", "up", "down")
    }
    fresh |= _router(flat["layers/router/weight"], start, router, model.config.init_std, seed)
    strength = (LOSSLESS_BIAS if bias is None else bias) if start == "lossless" else 0.0
    fresh["layers/router_bias"] = jnp.asarray(foreign_bias(sizes, strength, flat.get("layers/router_bias")))
    if score_function == "sigmoid":
        fresh["layers/score_offset"] = jnp.full(layers, offset, jnp.float32)
    kept = {path: leaf for path, leaf in flat.items() if path not in _REPLACED}
    config = pooled_config(model.config, total, router, score_function)
    return dataclasses.replace(model, config=config, params=trees.unflatten(kept | fresh))


def pooled_config(
    config: ModelConfig,
    experts: int,
    router: Literal["shared", "layer"] = "shared",
    score_function: Literal["softmax", "sigmoid"] = "softmax",
) -> ModelConfig:
    """The architecture with one pool of so many experts in place of the layers' own."""
    moe = dataclasses.replace(
        _moe(config), experts=experts, placement="shared", router=router, score_function=score_function,
        selection_bias=True, score_offset=score_function == "sigmoid",
    )  # fmt: skip
    return dataclasses.replace(config, moe=moe)


_REPLACED = (
    "layers/experts/gate", "layers/experts/up", "layers/experts/down", "layers/router/weight", "layers/router_bias",
    "layers/score_offset",
)  # fmt: skip


def foreign_bias(sizes: Sequence[int], strength: float, own: Sequence[Any] | None = None) -> np.ndarray:
    """-strength against the experts of other layers, [N, P], where layer n's own are the next sizes[n] of the pool.

    own: the selection biases that the layers had on their own experts, [sizes[n]] for each; None: 0.
    """
    layers = len(sizes)
    bias_NP = np.full((layers, sum(sizes)), -strength, np.float32)
    for layer, (stop, size) in enumerate(zip(itertools.accumulate(sizes), sizes, strict=True)):
        bias_NP[layer, stop - size : stop] = 0 if own is None else np.asarray(own[layer], np.float32)
    return bias_NP


def _router(router_NDE: jax.Array, start: Start, placement: str, std: float, seed: int) -> dict[str, jax.Array]:
    layers, width, experts = router_NDE.shape
    if start == "random":
        shape = (width, layers * experts) if placement == "shared" else (layers, width, layers * experts)
        fresh = std * jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        return {("" if placement == "shared" else "layers/") + "router/weight": fresh.astype(router_NDE.dtype)}
    concat = jnp.moveaxis(router_NDE, 0, 1).reshape(width, layers * experts)
    if placement == "shared":
        return {"router/weight": concat}
    return {"layers/router/weight": jnp.broadcast_to(concat[None], (layers, *concat.shape))}


def _moe(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise UserError("a dense model has no experts to pool")
    return config.moe


def check_options(start: Start, score_function: str, bias: float | None, offset: float) -> None:
    """Raises UserError when nothing would read the bias or the offset, or when they are out of range."""
    if bias is not None and start != "lossless":
        raise UserError(f"a bias is for the lossless start, and this one is {start}: leave one of them out")
    if bias is not None and not 0 <= bias < math.inf:
        raise UserError(f"bias={bias} must be 0 or above: it holds other layers' experts back")
    if offset != 0 and score_function != "sigmoid":
        raise UserError(f"an offset is for sigmoid scores, and these are {score_function}: leave one of them out")
    if not math.isfinite(offset):
        raise UserError(f"offset={offset} must be a number of logits")


def check_poolable(config: ModelConfig) -> None:
    """Raises UserError when no pool computes what this model computes."""
    _check_layers(config)
    if not _moe(config).normalize:
        raise UserError(
            "the weights of this model are not renormalised over the chosen experts (norm_topk_prob is false), which "
            "a pool cannot reproduce: choose a model with norm_topk_prob"
        )


def _check_layers(config: ModelConfig) -> None:
    if _moe(config).placement != "layer":
        raise UserError("the experts of this model are one pool already")
    if _moe(config).score_function == "sigmoid":
        raise UserError("pooling starts from softmax routers, and this model's score function is sigmoid")
