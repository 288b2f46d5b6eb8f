"""Helpers of hand-written gradients: which leaves need a gradient, and totals for these leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from moe_reduce.models.products import accumulation_dtype


@jax.tree_util.register_static
class Trained(frozenset):
    """Indices of the leaves of a tree that need a gradient. An adapter's fixed projections, for example, need none."""

    @classmethod
    def among(cls, marked: Any) -> "Trained":
        """Indices of the perturbed leaves of a tree of CustomVJPPrimal, which custom_vjp passes to a forward rule."""
        return cls(number for number, leaf in enumerate(jax.tree.leaves(marked)) if leaf.perturbed)

    def totals(self, tree: Any) -> Any:
        """Zero accumulators for a tree's gradient; None for leaves that need none."""
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype)) if number in self else None
            for number, leaf in enumerate(leaves)
        )


def primal_values(marked: Any) -> Any:
    """The arrays of a tree of CustomVJPPrimal, which custom_vjp passes to a forward rule if symbolic_zeros is set."""
    return jax.tree.map(lambda leaf: leaf.value, marked)


def instantiate_zeros(cotangent: Any) -> jax.Array:
    """A cotangent as an array: zeros for an output that is not differentiated, whose cotangent is a SymbolicZero."""
    shape, dtype = cotangent.shape, cotangent.dtype
    return jnp.zeros(shape, dtype) if isinstance(cotangent, SymbolicZero) else cotangent


def where_trained(function, totals, *others):
    """Apply function(total, …) to the leaves that need a gradient; the other leaves, whose total is None, stay None."""

    def apply(total, *leaves):
        return None if total is None else function(total, *leaves)

    return jax.tree.map(apply, totals, *others, is_leaf=lambda leaf: leaf is None)


def as_leaves(totals: Any, tree: Any) -> Any:
    """Totals cast to the dtypes of their leaves."""
    return where_trained(lambda total, leaf: total.astype(leaf.dtype), totals, tree)
