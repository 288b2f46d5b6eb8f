"""The weights of a group of SwiGLU experts, in the compute dtype, and the trained masters they are cast from."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models.weights import Product, Weight, cast, grouped_matmul, is_quantised, read, weight

Masters = tuple[jax.Array, ...]  # gate, up, down as they are trained; () where experts are frozen


class Experts(NamedTuple):
    """Weights of E SwiGLU experts, each [E, I, O]: gate and up [E, D, F], down [E, F, D].

    Their values are in the compute dtype and get no gradient: casting once for all layers saves passes over a shared
    pool. Gradients flow into the masters, the parameters that the values were cast from. Every call takes the masters
    and returns them, so their gradient accumulates in fp32 whatever the compute dtype.
    """

    gate: Weight
    up: Weight
    down: Weight

    @property
    def number(self) -> int:
        """Number of experts, E."""
        return self.gate.value.shape[0]

    @property
    def values(self) -> tuple[Any, ...]:
        """Values of gate, up and down."""
        return tuple(one.value for one in self)

    @property
    def deltas(self) -> dict[str, Any]:
        """Adapter deltas by the name of their weight; {} without an adapter."""
        return {name: one.delta for name, one in self._asdict().items() if one.delta is not None}

    @property
    def layout(self) -> str:
        """Layout of the operands of products."""
        return self.gate.layout

    def with_values(self, values: tuple[Any, ...]) -> "Experts":
        """The same experts and deltas with other values."""
        return Experts(*(_replaced(one, value) for one, value in zip(self, values, strict=True)))


def _replaced(one: Weight, value: Any) -> Weight:
    return Weight(value, one.delta, one.inputs, one.layout, one.exact)


class ExpertPool(nn.Module):
    """The experts of one layer, or of the pool that every layer calls: (experts in the compute dtype, masters)."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self) -> tuple[Experts, Masters]:
        experts = Experts(weight(self, "gate"), weight(self, "up"), weight(self, "down"))
        return computed(experts, jnp.dtype(self.execution.compute_dtype), self.execution.expert_gradients)


def computed(experts: Experts, dtype: Any, trained: bool) -> tuple[Experts, Masters]:
    """(experts with values cast to a dtype, masters). Masters are () if frozen; quantised experts always are."""
    values = experts.values
    masters = () if not trained or any(map(is_quantised, values)) else values
    return experts.with_values(tuple(jax.lax.stop_gradient(cast(value, dtype)) for value in values)), masters


class Router(nn.Module):
    """The weight of one linear router, [D, E]."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self) -> Weight:
        return weight(self, "weight")


def lend(experts: Experts, masters: Masters) -> tuple[Experts, Masters]:
    """(differentiable experts, masters to hand on): autodiff's gradient of the values is added to the masters'."""
    if not masters:
        return experts, masters
    values, masters = _lend(experts.values, masters)
    return experts.with_values(values), masters


@jax.custom_vjp
def _lend(values: tuple[jax.Array, ...], masters: Masters) -> tuple[tuple[jax.Array, ...], Masters]:
    return values, masters


def _lend_forward(values, masters):
    return (values, masters), None


def _lend_backward(_, cotangents):
    dvalues, dmasters = cotangents
    return None, tuple(total + part.astype(total.dtype) for total, part in zip(dmasters, dvalues, strict=True))


_lend.defvjp(_lend_forward, _lend_backward)


def swiglu(rows: jax.Array, experts: Experts, product: Product) -> jax.Array:
    """down(silu(gate·x) · up·x) of each row's expert, with adapter deltas. product: see `grouped_matmul`."""
    hidden = jax.nn.silu(grouped_matmul(rows, experts.gate, product)) * grouped_matmul(rows, experts.up, product)
    return grouped_matmul(hidden, experts.down, product)


def read_gain(module: Any) -> jax.Array | None:
    """The layer's output gain [D]; None where the model has none."""
    return read(module, "output_gain") if module.config.moe.output_gain else None
