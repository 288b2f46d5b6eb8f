"""Bytes of a training step on each device, from shapes alone, and the change that would reduce them."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from moe_reduce.core import trees
from moe_reduce.data import teacher_logits
from moe_reduce.data.batches import array_types
from moe_reduce.models.parameters import record_at
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import Job
from moe_reduce.training.task import Params, join, partition

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Footprint:
    """A job on a mesh, without any array: the arguments of its step are abstract leaves with shardings."""

    job: Job
    mesh: Mesh
    program: steps.Program
    frozen: Params
    batch: dict[str, Any]

    def held(self) -> dict[str, int]:
        """Bytes of a step's arguments on each device, by kind."""
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
        """Sequences that each device computes at a time."""
        return self.job.train.batch_size // self.job.train.accumulation // sharding.batch_shards(self.mesh)

    def activations(self) -> list[Shape]:
        """Activations that the forward pass keeps for the backward pass on each device, largest first.

        These are the residuals of the traced gradient whose shapes grow with the batch, after rematerialisation. They
        are whole along mesh.tensor, which would split some of them further.
        """
        one, two = (self._residuals(rows) for rows in (self.rows(), 2 * self.rows()))
        grown = [leaf for leaf, other in zip(one, two, strict=True) if leaf.shape != other.shape]
        return sorted(grown, key=_bytes, reverse=True)

    def _residuals(self, rows: int) -> list[Shape]:
        batch = {name: Shape((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in self.batch.items()}

        def backward(params: Params, frozen: Params, batch: dict[str, Any]) -> Any:
            return jax.vjp(lambda trained: self.job.task.loss(join(trained, frozen), batch)[0], params)[1]

        return jax.tree.leaves(jax.eval_shape(backward, self.program.state.params, self.frozen, batch))

    def estimate(self) -> dict[str, int]:
        """Estimated bytes on each device by kind, for use without a compiler; leaves out its temporary buffers."""
        gradients = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(self.program.state.params))
        return self.held() | {"gradients": gradients, "activations": sum(_bytes(leaf) for leaf in self.activations())}

    def remedy(self, memory: int) -> str:
        """Name the tensor that takes most of a device's `memory`, and the setting that shrinks it, in one sentence."""
        held = trees.flatten(self.program.state.params) | trees.flatten(self.frozen)
        copies = dict.fromkeys(trees.flatten(self.program.state.params), 3)  # with the two moments of Adam
        path, leaf = max(held.items(), key=lambda item: shard_bytes(item[1]) * copies.get(item[0], 1))
        size = shard_bytes(leaf) * copies.get(path, 1)
        activations = self.activations()
        if sum(self.held().values()) > memory / 2 or (activations and size > _bytes(activations[0])):
            return f"{path} {list(leaf.shape)} {leaf.dtype} takes {size:,} bytes of a device: {self._split(path)}"
        first = activations[0]
        problem = f"an activation {list(first.shape)} {first.dtype} takes {_bytes(first):,} bytes of a device"
        return f"{problem}: {self._fewer_activations()}"

    def _split(self, path: str) -> str:
        mesh_axes = record_at(self.job.task.records, path).mesh_axes
        axes = [axis for names in mesh_axes for axis in ((names,) if isinstance(names, str) else names or ())]
        free = [axis for axis in axes if self.mesh.shape[axis] == 1] or axes
        return f"raise mesh.{free[0]}" if free else "it is replicated on every device: make the model smaller"

    def _fewer_activations(self) -> str:
        job = self.job
        if job.execution.remat == "none":
            return "set execution.remat=dots or full"
        if self.rows() > 1:
            return f"raise train.accumulation (now {self.rows()} sequences at a time)"
        if job.execution.remat != "full":
            return "set execution.remat=full"
        return "raise mesh.tensor, or shorten data.sequence_length"


def of(job: Job, mesh: Mesh | AbstractMesh) -> Footprint:
    """Footprint of a job. UserError if its batch or a parameter does not divide over the mesh."""
    devices: Any = mesh
    initial = jax.eval_shape(job.initial) if callable(job.initial) else job.initial
    trained, frozen = (initial, {}) if callable(job.initial) else partition(initial, job.task.trainable)
    if not callable(job.initial):  # the loop keeps trained leaves in fp32
        trained = jax.tree.map(lambda leaf: Shape(leaf.shape, jnp.float32), trained)
    steps.check_batch(devices, job.train)
    frozen = join(frozen, job.frozen)
    program = steps.program(job.task, job.train, devices, trained)
    frozen = sharding.placed(frozen, sharding.shardings(devices, frozen, job.task.records))
    rows = sharding.batch_sharding(devices)
    arrays = array_types(job.data, job.train.batch_size)
    if job.stored_teacher:
        largest = min(teacher_logits.LARGEST, job.model.vocab_size)
        arrays |= teacher_logits.array_types(job.data, job.train.batch_size, largest)
    batch = {name: Shape(*array, sharding=rows) for name, array in arrays.items()}
    return Footprint(job, devices, program, frozen, batch)


def shard_bytes(leaf: Any) -> int:
    """Bytes of an abstract leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
