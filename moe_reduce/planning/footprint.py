"""Bytes that a training step keeps on each device, from shapes alone, and what to change where they are too many."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from moe_reduce.core import trees
from moe_reduce.models.parameters import lookup
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import Job
from moe_reduce.training.task import Params, join, partition

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Footprint:
    """A job on a mesh, of which nothing is made: the arguments of its step are abstract leaves with shardings."""

    job: Job
    mesh: Mesh
    program: steps.Program
    frozen: Params
    batch: dict[str, Any]

    def held(self) -> dict[str, int]:
        """Bytes on each device of what goes into a step, by what it is."""
        state = self.program.state
        kinds = {
            "trained_parameters": state.params,
            "optimizer": state.optimizer,
            "average": state.average,
            "frozen_parameters": self.frozen,
            "batch": self.batch,
        }
        return {name: sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in kinds.items() if tree}

    def rows(self) -> int:
        """Sequences on each device at a time."""
        return self.job.train.batch_size // self.job.train.accumulation // sharding.batch_shards(self.mesh)

    def kept(self) -> list[Shape]:
        """What the forward pass keeps for the backward pass on each device, largest first, as if `tensor` were 1.

        Measured on the traced gradient itself, so that rematerialisation counts as it is: what grows with the rows.
        """
        one, two = (self._residuals(rows) for rows in (self.rows(), 2 * self.rows()))
        grown = [leaf for leaf, other in zip(one, two, strict=True) if leaf.shape != other.shape]
        return sorted(grown, key=_bytes, reverse=True)

    def _residuals(self, rows: int) -> list[Shape]:
        part = {name: Shape((rows, leaf.shape[1]), leaf.dtype) for name, leaf in self.batch.items()}

        def backward(params: Params, frozen: Params, batch: dict[str, Any]) -> Any:
            return jax.vjp(lambda trained: self.job.task.loss(join(trained, frozen), batch)[0], params)[1]

        return jax.tree.leaves(jax.eval_shape(backward, self.program.state.params, self.frozen, part))

    def estimate(self) -> dict[str, int]:
        """Bytes on each device by kind, where no compiler says them: without its buffers for a moment."""
        gradients = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(self.program.state.params))
        return self.held() | {"gradients": gradients, "activations": sum(_bytes(leaf) for leaf in self.kept())}

    def remedy(self, memory: int) -> str:
        """Which tensor takes most of a device's `memory`, and what would make it smaller."""
        held = trees.flatten(self.program.state.params) | trees.flatten(self.frozen)
        copies = dict.fromkeys(trees.flatten(self.program.state.params), 3)  # two moments of Adam beside it
        path, leaf = max(held.items(), key=lambda item: shard_bytes(item[1]) * copies.get(item[0], 1))
        size = shard_bytes(leaf) * copies.get(path, 1)
        kept = self.kept()
        if sum(self.held().values()) > memory / 2 or (kept and size > _bytes(kept[0])):
            return f"{path} {list(leaf.shape)} {leaf.dtype} takes {size:,} bytes of a device: {self._split(path)}"
        shape = f"an activation {list(kept[0].shape)} {kept[0].dtype} takes {_bytes(kept[0]):,} bytes of a device"
        return f"{shape}: {self._fewer_rows()}"

    def _split(self, path: str) -> str:
        mesh_axes = lookup(self.job.task.records, path).mesh_axes
        axes = [axis for part in mesh_axes for axis in ((part,) if isinstance(part, str) else part or ())]
        free = [axis for axis in axes if self.mesh.shape[axis] == 1] or axes
        return f"raise mesh.{free[0]}" if free else "it lies whole on every device: make the model smaller"

    def _fewer_rows(self) -> str:
        job = self.job
        if job.execution.remat == "none":
            return "set execution.remat=dots or full"
        if self.rows() > 1:
            return f"raise train.accumulation (now {self.rows()} sequences at a time)"
        if job.execution.remat != "full":
            return "set execution.remat=full"
        return "raise mesh.tensor, or shorten data.sequence_length"


def of(job: Job, mesh: Mesh | AbstractMesh) -> Footprint:
    """The footprint of a job; raises UserError when its batch or a parameter does not divide over the mesh."""
    placed: Any = mesh
    initial = jax.eval_shape(job.initial) if callable(job.initial) else job.initial
    trained, frozen = (initial, {}) if callable(job.initial) else partition(initial, job.task.trainable)
    if not callable(job.initial):  # as the loop keeps them
        trained = jax.tree.map(lambda leaf: Shape(leaf.shape, jnp.float32), trained)
    steps.check_batch(placed, job.train)
    frozen = join(frozen, job.others)
    program = steps.program(job.task, job.train, placed, trained)
    rows = (job.train.batch_size, job.data.sequence_length)
    place = sharding.batch_sharding(placed)
    dtypes: dict[str, Any] = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if job.data.document_mask:
        dtypes |= {"segments": jnp.int32, "positions": jnp.int32}
    batch = {name: Shape(rows, dtype, sharding=place) for name, dtype in dtypes.items()}
    return Footprint(
        job, placed, program, sharding.placed(frozen, sharding.shardings(placed, frozen, job.task.records)), batch
    )


def shard_bytes(leaf: Any) -> int:
    """Bytes of an abstract leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
