"""The canonical form of a per-layer MoE, in which inputs and outputs of all experts have comparable sizes."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.activations import Gated
from moe_reduce.models.model import Model
from moe_reduce.models.norms import factor, stored_scale
from moe_reduce.models.parameters import Parameter, ffn_norm_scale, only_record, parameters, select
from moe_reduce.reduction.transform import Leaves, moe_of, transform

PROBES = 64  # number of random inputs that measure the output size of an expert


def canonical(model: Model, seed: int = 0) -> Model:
    """Rescale a model without changing its outputs, so that experts map unit-RMS inputs to outputs of comparable size.

    The scale of each layer's norm is folded into everything that reads what it scales: the router, the input matrices
    of the experts, and the block beside them. The output size of a layer's experts (RMS over random inputs of unit RMS)
    moves from `down` into the layer's output gain, which is added to the model if it has none. Arithmetic is in fp32,
    and each result has the dtype of its parameter. seed: seeds the random inputs. Raises UserError for a dense model
    and for a shared pool.
    """
    check_per_layer(model.config)
    moe = moe_of(model.config)
    config = dataclasses.replace(model.config, moe=dataclasses.replace(moe, output_gain=True))
    norm, output_gain = ffn_norm_scale(config), only_record(config, "output_gain")
    readers, experts = _readers(config), _experts(config)
    written = [experts["down"], *([experts["down_bias"]] if moe.biases else [])]
    known = [norm, *readers, *experts.values(), *([output_gain] if moe.output_gain else [])]
    replaced = list({record.path: record for record in known}.values())
    activation = Gated.of(config)

    def fold(leaves: Leaves) -> Leaves:
        wide = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items()}
        scale_ND = factor(config, wide[norm.path])
        folded = {record.path: wide[record.path] * _spread(scale_ND, record, "D") for record in readers}
        folded[norm.path] = stored_scale(config, jnp.ones_like(scale_ND))
        size_N = _output_sizes(
            {name: (wide | folded)[record.path] for name, record in experts.items()}, activation, seed
        )
        folded |= {record.path: wide[record.path] / _spread(size_N, record, "") for record in written}
        gain_ND = jnp.broadcast_to(size_N[:, None], scale_ND.shape)
        folded[output_gain.path] = gain_ND * wide[output_gain.path] if moe.output_gain else gain_ND
        folded = {path: folded.get(path, leaf) for path, leaf in (wide | folded).items()}
        return {path: leaf.astype(leaves[path].dtype) if path in leaves else leaf for path, leaf in folded.items()}

    return transform(model, config, replaced, fold)


def expert_matrices(config: ModelConfig) -> dict[str, Parameter]:
    """Records of the matrices of experts: gate, up and down."""
    return {record.name: record for record in select(config, component="experts", matrix=True)}


def _experts(config: ModelConfig) -> dict[str, Parameter]:
    """Records of the matrices of experts and of their biases, by name."""
    return {record.name: record for record in select(config, component="experts")}


def _readers(config: ModelConfig) -> list[Parameter]:
    """Records of parameters that multiply the normed input of the experts' half of a layer."""
    halves = ("router", "experts", "shared_expert")
    return [
        record
        for record in parameters(config)
        if record.component in halves and (record.inputs == "D" or record.axes == "ND")
    ]


def _spread(scale: jax.Array, record: Parameter, letters: str) -> jax.Array:
    """A scale of each layer [N], or of each layer and the axes of these letters, with all axes of a parameter."""
    return scale.reshape(
        [size if letter in f"N{letters}" else 1 for letter, size in zip(record.axes, record.shape, strict=True)]
    )


def check_per_layer(config: ModelConfig) -> None:
    """Raises UserError unless each layer, or each after the first dense ones, has its own experts."""
    if moe_of(config).placement != "layer":
        raise UserError("the experts of this model are one pool already: give a model with experts in each layer")


def _output_sizes(experts: dict[str, jax.Array], activation: Gated, seed: int) -> jax.Array:
    """RMS of the outputs of each layer's experts on the same random inputs of unit RMS, [N]; one expert at a time.

    experts: matrices [N, E, ·, ·] and biases [N, E, ·] by name.
    """
    x_SD = jax.random.normal(jax.random.key(seed), (PROBES, experts["gate"].shape[2]), jnp.float32)
    x_SD = x_SD / jnp.sqrt(jnp.mean(jnp.square(x_SD), axis=-1, keepdims=True))

    def mean_square(expert: dict[str, jax.Array]) -> jax.Array:
        def linear(x: jax.Array, name: str) -> jax.Array:
            y = x @ expert[name]
            return y + expert[f"{name}_bias"][None] if f"{name}_bias" in expert else y

        return jnp.mean(jnp.square(linear(activation(linear(x_SD, "gate"), linear(x_SD, "up")), "down")))

    def layer(experts: dict[str, jax.Array]) -> jax.Array:
        return jnp.sqrt(jnp.mean(jax.lax.map(mean_square, experts)))

    size_N = jax.lax.map(layer, experts)
    return jnp.where(size_N > 0, size_N, 1.0)
