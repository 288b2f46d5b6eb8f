"""One use of the training loop: what trains, from where, on what, and for how long."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_reduce.core.config import DataConfig, ExecutionConfig, ModelConfig, TrainConfig
from moe_reduce.data.batches import fingerprint, train_batches, validation_batches
from moe_reduce.data.shards import TokenSource
from moe_reduce.training import sharding
from moe_reduce.training.loop import Fit, Speed
from moe_reduce.training.task import Params, Task, join, partition
from moe_reduce.training.throughput import peak


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


def quality(validation: dict[str, Any]) -> dict[str, Any]:
    """What a summary says about a validation's sums."""
    losses = {name: validation[name] for name in ("loss", "perplexity", "accuracy")}
    return {"validation": losses, "expert_use": expert_use(validation)}


def expert_use(validation: dict[str, Any]) -> list[list[float]] | None:
    """Share of the assignments by layer and expert, [N][E]; None for a dense model."""
    if "counts_NE" not in validation:
        return None
    counts = np.asarray(validation["counts_NE"], np.float64)
    return (counts / counts.sum(axis=1, keepdims=True)).round(6).tolist()
