"""Device meshes, and the shardings of parameters and batches over them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_reduce.core import trees
from moe_reduce.core.config import MeshConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.mesh import BATCH_AXES
from moe_reduce.models.parameters import Parameter, Records, abstract_params, by_path, record_at
from moe_reduce.models.weights import map_parts

PIECE_BYTES = 2**30  # largest piece of a leaf that is replicated at a time
AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Make the mesh of a run from the first data·fsdp·expert·tensor devices; UserError when there are too few."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    chosen = np.array(devices[: math.prod(shape)]).reshape(shape)
    idle = {device.process_index for device in devices} - {device.process_index for device in chosen.flat}
    if idle:
        raise UserError(
            f"the mesh of {chosen.size} devices leaves process {min(idle)} without work: raise mesh.data or start fewer"
        )
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of AXES over this number of devices; UserError when there are too few."""
    per_row = config.fsdp * config.expert * config.tensor
    data = devices // per_row if config.data == -1 else config.data
    if data == 0 or data * per_row > devices:
        raise UserError(
            f"the mesh data={config.data} fsdp={config.fsdp} expert={config.expert} tensor={config.tensor} needs "
            f"{max(data, 1) * per_row} devices and there are {devices}: lower mesh.*"
        )
    return data, config.fsdp, config.expert, config.tensor


def shardings(mesh: Mesh, params: trees.Tree, records: Records) -> dict[str, Any]:
    """NamedShardings of a tree of parameters, in the same structure, from the records of its leaves.

    Raises UserError when a leaf has no record, or a size does not divide over its mesh axes.
    """
    return trees.map_with_path(lambda path, leaf: _sharding(mesh, record_at(records, path), leaf), params)


def model_shardings(mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """NamedShardings of a model's parameters; raises UserError when a size does not divide over its mesh axes."""
    return shardings(mesh, abstract_params(config), by_path(config))


def _sharding(mesh: Mesh, record: Parameter, leaf: Any) -> Any:
    def place(axes: tuple[int | None, ...], part: Any) -> NamedSharding:
        mesh_axes = [None if axis is None else record.mesh_axes[axis] for axis in axes]
        for size, names in zip(part.shape, mesh_axes, strict=True):
            names = (names,) if isinstance(names, str) else names or ()
            devices = math.prod(mesh.shape[name] for name in names)
            if size % devices:
                raise UserError(
                    f"{record.path} has a size of {size}, which mesh axes {names} of {devices} devices do not divide"
                )
        split = max((number for number, axis in enumerate(mesh_axes, 1) if axis is not None), default=0)
        return NamedSharding(mesh, PartitionSpec(*mesh_axes[:split]))

    return map_parts(place, record, leaf)


def placed(shapes: Any, shardings: Any) -> Any:
    """Give abstract leaves their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that keeps the whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def to_host(mesh: Mesh, params: trees.Tree) -> dict[str, Any]:
    """Gather whole leaves as numpy arrays in every process, in pieces small enough to fit beside a device's shards."""
    gather: Any = jax.jit(lambda piece: piece, out_shardings=replicated(mesh))

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        rows = max(1, PIECE_BYTES // max(1, leaf.nbytes // leaf.shape[0])) if leaf.ndim else 1
        if not leaf.ndim or rows >= leaf.shape[0]:
            return np.asarray(gather(leaf))
        pieces = (np.asarray(gather(leaf[first : first + rows])) for first in range(0, leaf.shape[0], rows))
        return np.concatenate(list(pieces))

    return jax.tree.map(whole, dict(params))


def compiled(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Jit a function; on a mesh its results are replicated. mesh: None for one device."""
    if mesh is None:
        return jax.jit(function)
    on_mesh = jax.jit(function, out_shardings=replicated(mesh))

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return on_mesh(*arguments)

    return call


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: rows over every mesh axis but `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """Shard of a batch's rows that this process reads: (index, number of such shards), for `train_batches`.

    Processes whose devices hold the same rows (the tensor axis across hosts) read the same shard. Raises UserError when
    the rows do not divide evenly over the hosts.
    """
    parts = mesh.devices.reshape(batch_shards(mesh), -1)
    fed: dict[int, set[int]] = {}
    for part, devices in enumerate(parts):
        for device in devices:
            fed.setdefault(device.process_index, set()).add(part)
    shards = sorted({tuple(sorted(rows)) for rows in fed.values()})
    if sum(len(shard) for shard in shards) != len(parts) or len({len(shard) for shard in shards}) > 1:
        raise UserError(
            f"mesh.data · mesh.fsdp · mesh.expert = {len(parts)} does not divide evenly over the {len(fed)} hosts: "
            "make it, or mesh.tensor, a multiple of the devices of a host"
        )
    return shards.index(tuple(sorted(fed[jax.process_index()]))), len(shards)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this process's rows of a global batch on the mesh, as global arrays."""
    sharding = batch_sharding(mesh)
    # explicit, but with several processes jax treats it as an implicit transfer, which the loop forbids
    with jax.transfer_guard_host_to_device("allow"):
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
