"""Weights of a group of gated experts in the compute dtype, and the master weights that they are cast from."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import deltas
from moe_reduce.models.activations import SWIGLU, Gated
from moe_reduce.models.moe.routing import RouterWeights
from moe_reduce.models.weights import Product, Weight, cast, grouped_matmul, is_quantised, read, weight

Masters = tuple[jax.Array, ...]  # master weights: the experts' values as they are trained; () for frozen experts
MATRICES = ("gate", "up", "down")


class Experts(NamedTuple):
    """Weights of E gated experts, each [E, I, O]: gate and up [E, D, F], down [E, F, D].

    biases: of gate and up [E, 1, F], and of down [E, 1, D]; () without them. activation: between them.

    The values are copies of the master weights in the compute dtype, and get no gradient; a shared pool is copied once,
    not in each layer. The masters get the gradient, in fp32 whatever the compute dtype. To add it up, each call of the
    experts takes the masters and returns them unchanged: the backward pass then hands their gradient from call to call,
    and each call adds its own.
    """

    gate: Weight
    up: Weight
    down: Weight
    biases: tuple[jax.Array, ...] = ()
    activation: Gated = SWIGLU

    @property
    def matrices(self) -> dict[str, Weight]:
        """The matrices by name."""
        return {name: getattr(self, name) for name in MATRICES}

    @property
    def number(self) -> int:
        """Number of experts, E."""
        return self.gate.value.shape[0]

    @property
    def values(self) -> tuple[Any, ...]:
        """Values of gate, up and down, and their biases if there are any."""
        return (*(one.value for one in self.matrices.values()), *self.biases)

    @property
    def deltas(self) -> dict[str, Any]:
        """Adapter deltas by the name of their weight; {} without an adapter."""
        return {name: one.delta for name, one in self.matrices.items() if one.delta is not None}

    @property
    def entries(self) -> int:
        """Number of entries of the bank of adapters, Z; 0 without a bank."""
        return max(map(deltas.entries, self.deltas.values()), default=0)

    @property
    def groups(self) -> int:
        """Number of groups of rows, J = E·Z: one for each expert and entry of a bank; E without a bank."""
        return self.number * max(self.entries, 1)

    @property
    def layout(self) -> str:
        """Layout of the operands of products."""
        return self.gate.layout

    def with_values(self, values: tuple[Any, ...]) -> "Experts":
        """The same experts and deltas with other values."""
        matrices = zip(self.matrices.items(), values, strict=False)
        changed = {name: dataclasses.replace(one, value=value) for (name, one), value in matrices}
        return self._replace(**changed, biases=tuple(values[len(MATRICES) :]))

    def with_bias_share(self, share: float) -> "Experts":
        """The same experts with a share of the bias of `down`, for devices whose outputs are summed."""
        return self._replace(biases=(*self.biases[:2], self.biases[2] * share)) if self.biases else self

    def group_rows(self, experts_BTA: jax.Array) -> tuple["Experts", jax.Array]:
        """(experts without the entries of a bank's batch rows, group of each assignment, expert · Z + entry).

        Without a bank, the group is the expert.
        """
        entry_B = next((delta[deltas.ENTRY] for delta in self.deltas.values() if deltas.ENTRY in delta), None)
        if entry_B is None:
            return self, experts_BTA
        bare = {
            name: one if one.delta is None else dataclasses.replace(one, delta=deltas.without_entry(one.delta))
            for name, one in self.matrices.items()
        }
        entry_BTA = jnp.broadcast_to(entry_B[:, None, None], experts_BTA.shape)
        return self._replace(**bare), experts_BTA * self.entries + entry_BTA


class ExpertPool(nn.Module):
    """The experts of one layer, or of the shared pool: (experts in the compute dtype, master weights)."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self) -> tuple[Experts, Masters]:
        assert self.config.moe is not None
        names = MATRICES if self.config.moe.biases else ()
        biases = tuple(read(self, f"{name}_bias")[:, None] for name in names)
        matrices = {name: weight(self, name) for name in MATRICES}
        experts = Experts(**matrices, biases=biases, activation=Gated.of(self.config))
        return cast_experts(experts, jnp.dtype(self.execution.compute_dtype), self.execution.expert_gradients)


def cast_experts(experts: Experts, dtype: Any, trained: bool) -> tuple[Experts, Masters]:
    """(experts with values cast to a dtype, masters). Masters are () if not trained or if any value is quantised."""
    values = experts.values
    masters = () if not trained or any(map(is_quantised, values)) else values
    return experts.with_values(tuple(jax.lax.stop_gradient(cast(value, dtype)) for value in values)), masters


class Router(nn.Module):
    """The weight of one linear router, [D, E], and its bias [E] if it has one."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self) -> RouterWeights:
        assert self.config.moe is not None
        bias_E = read(self, "bias") if self.config.moe.biases else None
        return RouterWeights(weight(self, "weight"), logit_bias_E=bias_E)


def with_master_gradients(experts: Experts, masters: Masters) -> tuple[Experts, Masters]:
    """(experts, masters for the next call); gradients that JAX derives for the experts are added to the masters'."""
    if not masters:
        return experts, masters
    values, masters = _with_master_gradients(experts.values, masters)
    return experts.with_values(values), masters


@jax.custom_vjp
def _with_master_gradients(values: tuple[jax.Array, ...], masters: Masters) -> tuple[tuple[jax.Array, ...], Masters]:
    return values, masters


def _with_master_gradients_forward(values, masters):
    return (values, masters), None


def _with_master_gradients_backward(_, cotangents):
    dvalues, dmasters = cotangents
    return None, tuple(total + part.astype(total.dtype) for total, part in zip(dmasters, dvalues, strict=True))


_with_master_gradients.defvjp(_with_master_gradients_forward, _with_master_gradients_backward)


def swiglu(rows: jax.Array, experts: Experts, product: Product) -> jax.Array:
    """down(activation(gate·x, up·x)) of each row's expert, with biases and adapter deltas.

    product: see `grouped_matmul`.
    """

    def linear(rows: jax.Array, number: int) -> jax.Array:
        y = grouped_matmul(rows, getattr(experts, MATRICES[number]), product)
        if not experts.biases:
            return y
        # a bias is the matrix of an input that is always 1
        return y + product(jnp.ones((*rows.shape[:-1], 1), rows.dtype), experts.biases[number])

    hidden = experts.activation(linear(rows, 0), linear(rows, 1))
    return linear(hidden, 2)


def read_gain(module: Any) -> jax.Array | None:
    """The layer's output gain [D]; None where the model has none."""
    return read(module, "output_gain") if module.config.moe.output_gain else None
