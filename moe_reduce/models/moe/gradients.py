"""What gradients written by hand have in common: which leaves one is asked for, and totals of those alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from moe_reduce.models.products import wide


@jax.tree_util.register_static
class Trained(frozenset):
    """Numbers of the leaves of a tree that a gradient is asked for; sketches of an adapter, for one, are fixed."""

    @classmethod
    def among(cls, marked: Any) -> "Trained":
        """Of a tree as a forward rule with symbolic zeros is given it."""
        return cls(number for number, leaf in enumerate(jax.tree.leaves(marked)) if leaf.perturbed)

    def totals(self, tree: Any) -> Any:
        """Zeros to add up the gradient of a tree in, None for leaves that need none."""
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            jnp.zeros(leaf.shape, wide(leaf.dtype)) if number in self else None for number, leaf in enumerate(leaves)
        )


def values(marked: Any) -> Any:
    """The arrays of a tree as a forward rule with symbolic zeros is given it."""
    return jax.tree.map(lambda leaf: leaf.value, marked)


def dense(cotangent: Any) -> jax.Array:
    """Of an output that nobody differentiated, zeros."""
    shape, dtype = cotangent.shape, cotangent.dtype
    return jnp.zeros(shape, dtype) if isinstance(cotangent, SymbolicZero) else cotangent


def where_trained(function, totals, *others):
    """function of the leaves that have a total; None, which is no gradient, stays."""

    def apply(total, *leaves):
        return None if total is None else function(total, *leaves)

    return jax.tree.map(apply, totals, *others, is_leaf=lambda leaf: leaf is None)


def as_leaves(totals: Any, tree: Any) -> Any:
    """Totals in the dtypes of the leaves that they are gradients of."""
    return where_trained(lambda total, leaf: total.astype(leaf.dtype), totals, tree)
