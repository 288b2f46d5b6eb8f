"""One RunConfig -> a workdir: data, mesh, task, loop, then model/ and summary.json."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_reduce import config_dict, disk, planning
from moe_reduce.config import DataConfig, ExecutionConfig, ModelConfig, RunConfig, TrainConfig, to_dict
from moe_reduce.data.batches import fingerprint, train_batches, validation_batches
from moe_reduce.data.prepare import prepare
from moe_reduce.data.shards import TokenSource
from moe_reduce.errors import UserError
from moe_reduce.models.decoder import abstract_params, init_params
from moe_reduce.storage.manifest import Input, Step
from moe_reduce.storage.model import Model, save
from moe_reduce.training import sharding, steps
from moe_reduce.training.loop import Fit, Speed
from moe_reduce.training.losses import language_model_task
from moe_reduce.training.task import Params, Task, join, partition
from moe_reduce.training.throughput import peak

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Job:
    """One use of the loop: what trains, from where, on what, and for how long."""

    task: Task
    model: ModelConfig
    initial: Params | Callable[[], Params]  # all leaves of the model; made under jit where they are to lie, or given
    execution: ExecutionConfig
    data: DataConfig
    train: TrainConfig
    others: Params = field(default_factory=dict)  # frozen leaves that the task reads and the model does not have
    flops_per_token: float | None = None  # None: not counted, as where a part of the model trains


def train(run: RunConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Trains, or goes on, or finds it done; returns the content of summary.json."""
    run = dataclasses.replace(run, execution=run.execution.resolve(jax.default_backend()))
    mesh = sharding.make_mesh(run.mesh)
    sharding.shardings(mesh, abstract_params(run.model))  # refused before anything is prepared
    steps.check_batch(mesh, run.train)
    done = begin(workdir, run)
    if done is not None:
        return done
    tokens, _ = prepare(run.data, run.model.vocab_size)
    job = pretraining(run)
    with writing(workdir):
        params, figures = fit(job, mesh, tokens, workdir)
        summary = {"name": name, **describe(run.model), "seed": run.train.seed, **figures, **machine()}
        step = Step(
            command="train",
            arguments=to_dict(run),
            inputs=(Input(run.data.source, fingerprint(tokens, run.data)),),
            parameters_before=0,
            parameters_after=summary["parameters"],
            quality=summary["validation"],
        )
        params = sharding.to_host(mesh, params)
        finish(workdir, Model(run.model, params, run.execution, getattr(tokens, "directory", None)), step, summary)
    return summary


def pretraining(run: RunConfig) -> Job:
    """Every leaf of a new model, on the next token. run.execution: resolved."""
    task = language_model_task(run.model, run.execution, run.balance)
    initial = partial(init_params, run.model, jax.random.key(run.train.seed))
    flops = planning.train_flops_per_token(run.model, run.data.sequence_length)
    return Job(task, run.model, initial, run.execution, run.data, run.train, flops_per_token=flops)


def fit(job: Job, mesh: Mesh, tokens: TokenSource, workdir: Path) -> tuple[Params, dict[str, Any]]:
    """(all leaves of the model after training, the figures of a summary), going on where an earlier call stopped."""
    started = time.time()
    trained, frozen = (job.initial, {}) if callable(job.initial) else partition(job.initial, job.task.trainable)
    if not callable(trained):  # copies: the loop gives the buffers of its state away
        trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    tokens_per_step = job.train.batch_size * job.data.sequence_length
    highest = peak(list(mesh.devices.flat), job.execution.compute_dtype)
    speed = Speed(tokens_per_step, job.flops_per_token, highest)
    share = sharding.batch_share(mesh)
    outcome = Fit(
        task=job.task,
        initial=trained,
        frozen=join(frozen, job.others),
        train=job.train,
        mesh=mesh,
        batches=train_batches(tokens, job.data, job.train.batch_size, job.train.seed, *share),
        validation=validation_batches(tokens, job.data, job.train.batch_size, job.train.evaluate_batches, *share),
        workdir=workdir,
        speed=speed,
        corpus=fingerprint(tokens, job.data),
    ).run()
    rate = outcome.tokens_per_second if outcome.intervals else None
    figures = {
        "train_flops_per_token": job.flops_per_token,
        "tokens": job.train.steps * tokens_per_step,
        "steps": job.train.steps,
        **quality(outcome.validation),
        "measured": outcome.measured,
        "tokens_per_second": rate,
        "mfu": None if rate is None else speed.mfu(rate),
        "peak_flops": highest.flops,
        "peak_source": highest.source,
        "compile_seconds": outcome.compile_seconds,
        "seconds": time.time() - started,
    }
    return join(outcome.params, frozen), figures


def finish(
    workdir: Path, model: Model, step: Step, summary: dict[str, Any], report: Callable[[], None] = lambda: None
) -> None:
    """model/ first, then what there is to report about it, summary.json last: its presence means that the run is done.

    By the first process alone."""
    if jax.process_index() == 0:
        save(model, workdir / "model", step, overwrite=True)
        report()
        disk.write_json(workdir / SUMMARY, summary)
    if jax.process_count() > 1:  # none leaves, and takes the others' connection down, before the result is written
        multihost_utils.sync_global_devices("result written")


def writing(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """A full disk below a workdir is one line, and nothing is lost."""
    return disk.writing(f"below {workdir}", "free some space, then run the same command again to go on")


def begin(workdir: Path, run: Any) -> dict[str, Any] | None:
    """Claims the workdir; says so, and returns the summary, when its run is done already."""
    claim(workdir, run)
    done = finished(workdir)
    if done is not None:
        print(f"{workdir} is done: nothing to do (a new --workdir starts again)")
    return done


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that is done, {} where only the first process's disk has it; None while it is not."""
    file = workdir / SUMMARY
    done = file.exists()
    if jax.process_count() > 1:  # disks differ, or show each other's files late, and all must do the same
        done = bool(multihost_utils.broadcast_one_to_all(np.asarray(done)))
    if not done:
        return None
    return json.loads(file.read_text()) if file.exists() else {}


def claim(workdir: Path, run: Any) -> None:
    """Makes the workdir this run's, by its resolved configuration; raises UserError when it is another's, or read-only.

    run: a dataclass of moe_reduce.config. Keys that are newer than the workdir have their defaults there. It may go on
    over another mesh, onto which checkpoints are restored. A run that ended before its first step, as for a missing
    corpus, may be corrected and started in the same place.
    """
    file, wanted = workdir / "config.json", to_dict(run)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = config_dict.completed(type(run), json.loads(file.read_text())) if file.exists() else wanted
        moved = found | {"mesh": wanted["mesh"]} if isinstance(found, dict) else found
        difference = _first_difference(moved, wanted)
        began = any(child.is_dir() for child in workdir.iterdir()) or set(found) != set(wanted)
        if difference and began:
            raise UserError(
                f"--workdir={workdir} belongs to another configuration ({difference}): choose another workdir"
            )
        if found != wanted or not file.exists():
            disk.write_json(file, wanted)
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir} cannot be used ({error}): choose another one") from error


def _first_difference(found: Any, wanted: Any, path: str = "") -> str:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return "" if found == wanted else f"{path} is {found!r} there and {wanted!r} here"
    for key in sorted(set(found) | set(wanted)):
        if key not in found or key not in wanted:
            return f"only one of them has {path}{'.' if path else ''}{key}"
        difference = _first_difference(found[key], wanted[key], f"{path}.{key}" if path else key)
        if difference:
            return difference
    return ""


def quality(validation: dict[str, Any]) -> dict[str, Any]:
    """What a summary says about a validation's sums."""
    losses = {name: validation[name] for name in ("loss", "perplexity", "accuracy")}
    return {"validation": losses, "expert_use": expert_use(validation)}


def machine() -> dict[str, Any]:
    """Where a summary's figures were measured."""
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return {"machine": device, "jax": jax.__version__}


def describe(model: ModelConfig) -> dict[str, Any]:
    """Exact parameter counts and fp32 bytes, from abstract initialisation."""
    params = abstract_params(model)
    total = planning.count(params)
    return {"parameters": total, "by_component": planning.counts_by_component(params), "bytes": 4 * total}


def expert_use(validation: dict[str, Any]) -> list[list[float]] | None:
    """Share of the assignments by layer and expert, [N][E]; None for a dense model."""
    if "counts_NE" not in validation:
        return None
    counts = np.asarray(validation["counts_NE"], np.float64)
    return (counts / counts.sum(axis=1, keepdims=True)).round(6).tolist()
