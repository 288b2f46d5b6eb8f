"""Meshes of devices that are not present: TPU slices that libtpu compiles for, and GPUs by number only."""

import importlib.util
import os
import re
from dataclasses import dataclass

from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_reduce.core.config import MeshConfig
from moe_reduce.core.devices import Device, device
from moe_reduce.core.errors import UserError
from moe_reduce.training import sharding

# keeps libtpu from searching for a TPU, and from logging at length that there is none
OFFLINE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


@dataclass(frozen=True)
class Topology:
    """A set of equal devices. memory: bytes on each device that a program can use."""

    name: str
    device: Device
    platform: str
    memory: int
    mesh: Mesh | AbstractMesh  # concrete if a compiler is available


def topology(name: str, config: MeshConfig) -> Topology:
    """Parse a TPU slice such as `v4:2x2x4`, or a number of GPUs such as `h100:8`; UserError for anything else."""
    kind, _, size = name.partition(":")
    found = device(kind)
    if found.kind is not None and found.kind.startswith("TPU"):
        if not re.fullmatch(r"\d+(x\d+)+", size):
            raise UserError(f"--topology={name} must name a slice by its chips, such as {kind}:2x2x4")
        mesh = sharding.make_mesh(config, _tpu_devices(name, found))
        return Topology(name, found, "tpu", found.memory, mesh)
    if not size.isdigit() or int(size) == 0:
        raise UserError(f"--topology={name} must give the number of GPUs, such as {kind}:8")
    shape = sharding.mesh_shape(config, int(size))
    mesh = AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return Topology(name, found, "gpu", found.memory, mesh)


def _tpu_devices(name: str, chip: Device) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name} needs TPU's compiler: pip install -e '.[tpu]' in a separate environment")
    os.environ.update(OFFLINE)
    cores = {} if chip.cores is None else {"chip_config_name": chip.cores}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices)
    except Exception as error:  # libtpu raises various types for an unknown slice
        raise UserError(f"--topology={name} is not known to libtpu: {str(error).splitlines()[0]}") from error
