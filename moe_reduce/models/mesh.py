"""Placement of a batch's arrays on the mesh in context, whose axes training/sharding.py explains."""

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp", "expert")  # rows of a batch are split over all three


def shard_batch(x: jax.Array) -> jax.Array:
    """Keeps the batch split over the mesh in context; without a mesh, x."""
    return _constrained(x, PartitionSpec(BATCH_AXES))


def whole(x: jax.Array) -> jax.Array:
    """Keeps a copy of x on every device of the mesh in context."""
    return _constrained(x, PartitionSpec())


def on_one_device() -> bool:
    """True without a mesh in context, or with one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)
