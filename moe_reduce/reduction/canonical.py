"""The canonical form of a per-layer MoE, in which inputs and outputs of all experts have comparable sizes."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, ffn_norm_scale, only_record, select
from moe_reduce.reduction.transform import Leaves, moe_of, transform

PROBES = 64  # number of random inputs that measure the output size of an expert


def canonical(model: Model, seed: int = 0) -> Model:
    """Rescale a model without changing its outputs, so that experts map unit-RMS inputs to outputs of comparable size.

    The scale of each layer's norm is folded into its router and the input matrices of its experts. The output size of
    a layer's experts (their RMS over random inputs of unit RMS) moves from `down` into the layer's output gain, which
    is added to the model if it has none. Arithmetic is in fp32; parameters keep their dtypes. seed: seeds the random
    inputs. Raises UserError for a dense model, a shared pool and sigmoid routers.
    """
    check_per_layer(model.config)
    moe = moe_of(model.config)
    config = dataclasses.replace(model.config, moe=dataclasses.replace(moe, output_gain=True))
    norm, router, output_gain = (
        ffn_norm_scale(config),
        only_record(config, "router"),
        only_record(config, "output_gain"),
    )
    experts = expert_matrices(config)
    replaced = [norm, router, *experts.values(), *([output_gain] if moe.output_gain else [])]

    def fold(leaves: Leaves) -> Leaves:
        wide = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items()}
        scale_ND = wide[norm.path]
        gate, up = (wide[experts[name].path] * scale_ND[:, None, :, None] for name in ("gate", "up"))
        down = wide[experts["down"].path]
        size_N = _output_sizes(gate, up, down, seed)
        gain_ND = jnp.broadcast_to(size_N[:, None], scale_ND.shape)
        folded = {
            norm.path: jnp.ones_like(scale_ND),
            router.path: wide[router.path] * scale_ND[:, :, None],
            experts["gate"].path: gate,
            experts["up"].path: up,
            experts["down"].path: down / size_N[:, None, None, None],
            output_gain.path: gain_ND * wide[output_gain.path] if moe.output_gain else gain_ND,
        }
        return {path: leaf.astype(leaves[path].dtype) if path in leaves else leaf for path, leaf in folded.items()}

    return transform(model, config, replaced, fold)


def expert_matrices(config: ModelConfig) -> dict[str, Parameter]:
    """Records of the matrices of experts: gate, up and down."""
    return {record.name: record for record in select(config, component="experts")}


def check_per_layer(config: ModelConfig) -> None:
    """Raises UserError unless each layer has its own experts and a softmax router."""
    moe = moe_of(config)
    if moe.placement != "layer":
        raise UserError("the experts of this model are one pool already: give a model with experts in each layer")
    if moe.score_function == "sigmoid":
        raise UserError(
            "pooling starts from softmax routers, and this model's score function is sigmoid: pool the model that "
            "it was made from"
        )


def _output_sizes(gate_NEDF: jax.Array, up_NEDF: jax.Array, down_NEFD: jax.Array, seed: int) -> jax.Array:
    """RMS of the outputs of each layer's experts on the same random inputs of unit RMS, [N]; one expert at a time."""
    x_SD = jax.random.normal(jax.random.key(seed), (PROBES, gate_NEDF.shape[2]), jnp.float32)
    x_SD = x_SD / jnp.sqrt(jnp.mean(jnp.square(x_SD), axis=-1, keepdims=True))

    def mean_square(matrices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        gate_DF, up_DF, down_FD = matrices
        return jnp.mean(jnp.square((jax.nn.silu(x_SD @ gate_DF) * (x_SD @ up_DF)) @ down_FD))

    def layer(matrices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.sqrt(jnp.mean(jax.lax.map(mean_square, matrices)))

    size_N = jax.lax.map(layer, (gate_NEDF, up_NEDF, down_NEFD))
    return jnp.where(size_N > 0, size_N, 1.0)
