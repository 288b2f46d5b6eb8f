"""Placement of arrays on the mesh in context; training/sharding.py explains its axes."""

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp", "expert")  # rows of a batch are split over all three


def shard_batch(x: jax.Array) -> jax.Array:
    """Constrain x to be split by batch rows over the mesh in context, if any."""
    return _constrained(x, PartitionSpec(BATCH_AXES))


def replicated(x: jax.Array) -> jax.Array:
    """Constrain x to be replicated over the mesh in context, if any."""
    return _constrained(x, PartitionSpec())


def on_one_device() -> bool:
    """True without a mesh in context, or with one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)
