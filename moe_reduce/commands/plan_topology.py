"""moe-reduce plan --topology: estimate the training step of a run on devices that are not present."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moe_reduce.commands import model_arguments
from moe_reduce.core.config import AdaptConfig, ReduceConfig, RunConfig
from moe_reduce.core.errors import UserError
from moe_reduce.planning import compiled_step, footprint
from moe_reduce.planning.topologies import Topology, topology
from moe_reduce.runs import adapt as adapters
from moe_reduce.runs.stages import planned_jobs
from moe_reduce.runs.train import pretraining
from moe_reduce.storage.parameter_tensors import open_tensors
from moe_reduce.training.job import Job


def plan(
    runs: dict[str, RunConfig | ReduceConfig | AdaptConfig], name: str, stages: list[str] | None
) -> dict[str, Any]:
    """Memory and cost of a training step on each device, by run and stage. Raises UserError for an invalid request."""
    plans = {}
    for run_name, run in runs.items():
        target = topology(name, run.mesh)
        resolved = dataclasses.replace(run, execution=run.execution.resolve(target.platform))
        for stage, job in _jobs(resolved, stages):
            plans[f"{run_name} {stage}".strip()] = _head(job, target) | _report(job, target)
    return plans


def _jobs(run: RunConfig | ReduceConfig | AdaptConfig, stages: list[str] | None) -> Iterator[tuple[str, Job]]:
    if run.train.epochs is not None:  # the text is not read, and what a step needs does not depend on their number
        train = dataclasses.replace(run.train, steps=run.train.warmup_steps + 1, epochs=None)
        run = dataclasses.replace(run, train=train)
    if isinstance(run, RunConfig):
        yield "", pretraining(run)
        return
    dtype = _stored_dtype(Path(run.model)) if run.dtype == "stored" else run.dtype
    if isinstance(run, AdaptConfig):
        yield "", adapters.planned_job(run, model_arguments.directory_config(Path(run.model)), dtype)
        return
    first = run.architecture or model_arguments.directory_config(Path(run.model))
    known = dict(planned_jobs(first, run, dtype))
    for name in stages or known:
        if name not in known:
            raise UserError(f"--stage={name} trains nothing; stages that do: {', '.join(known)}")
        yield name, known[name]


def _stored_dtype(directory: Path) -> Any:
    """The dtype of most bytes of a model; bfloat16, the usual one, if the model is not present."""
    if not directory.exists():
        return "bfloat16"
    sizes: dict[Any, int] = {}
    for entry in open_tensors(directory, model_arguments.directory_config(directory)).entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape) * entry.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype])


def _head(job: Job, target: Topology) -> dict[str, Any]:
    sizes = {axis: size for axis, size in target.mesh.shape.items() if size > 1}
    return {
        "topology": target.name,
        "devices": target.mesh.size,
        "mesh": " ".join(f"{axis}={size}" for axis, size in sizes.items()),
        "memory_bytes": target.memory,
        "batch": f"{job.train.batch_size} x {job.data.sequence_length} in {job.train.accumulation} parts",
    }


def _report(job: Job, target: Topology) -> dict[str, Any]:
    if isinstance(target.mesh, Mesh):
        return compiled_step.compile_step(job, target.mesh, target.memory)
    step = footprint.of(job, target.mesh)
    sizes = step.estimate()
    total = sum(sizes.values())
    report = {
        "fits": total <= target.memory,
        "bytes": total,
        "share_of_memory": round(total / target.memory, 4),
        "estimated_bytes": sizes,
        "model_flops": compiled_step.model_flops(job, target.mesh.size),
    }
    return report if report["fits"] else report | {"remedy": step.remedy(target.memory)}
