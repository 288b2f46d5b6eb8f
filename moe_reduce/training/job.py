"""Training jobs: a model, its task and its data, turned into a problem for the loop and figures for a summary."""

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
from moe_reduce.training.loop import Feed, Fit, Outcome, Problem, Speed
from moe_reduce.training.task import Params, Task, join, partition
from moe_reduce.training.throughput import peak


@dataclass(frozen=True)
class Job:
    """One use of the training loop: a task, its model and starting parameters, and the data and schedule."""

    task: Task
    model: ModelConfig
    initial: Params | Callable[[], Params]  # all leaves of the model, or a function that makes them sharded, under jit
    execution: ExecutionConfig
    data: DataConfig
    train: TrainConfig
    frozen: Params = field(default_factory=dict)  # frozen leaves beside the model's own, such as a teacher's
    stored_teacher: bool = False  # batches also hold the distribution of a teacher (data/teacher_logits.py)
    flops_per_token: float | None = None  # None: not counted, as when only a part of the model trains


def fit(job: Job, mesh: Mesh, tokens: TokenSource, workdir: Path) -> tuple[Params, dict[str, Any]]:
    """Train, or resume an earlier call in the same workdir; return (all leaves of the model, figures of a summary)."""
    return fit_batches(job, mesh, feed(job, mesh, tokens), workdir)


def fit_batches(job: Job, mesh: Mesh, batches: Feed, workdir: Path) -> tuple[Params, dict[str, Any]]:
    """Train, as `fit`, on batches that the caller makes."""
    started = time.time()
    trained, frozen = (job.initial, {}) if callable(job.initial) else partition(job.initial, job.task.trainable)
    if not callable(trained):  # copies, because the loop donates the buffers of its state
        trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    tokens_per_step = job.train.batch_size * job.data.sequence_length
    highest = peak(list(mesh.devices.flat), job.execution.compute_dtype)
    speed = Speed(tokens_per_step, job.flops_per_token, highest)
    problem = Problem(job.task, trained, join(frozen, job.frozen), job.train)
    outcome = Fit(problem, batches, mesh, workdir, speed).run()
    figures = _figures(job, outcome, speed) | {"seconds": time.time() - started}
    return join(outcome.params, frozen), figures


def feed(job: Job, mesh: Mesh, tokens: TokenSource) -> Feed:
    """Make the batches of a job; this process reads only its own rows."""
    shard = sharding.process_shard(mesh)
    size, seed = job.train.batch_size, job.train.seed
    return Feed(
        batches=train_batches(tokens, job.data, size, seed, *shard),
        validation=validation_batches(tokens, job.data, size, job.train.evaluate_batches, *shard),
        corpus=fingerprint(tokens, job.data),
    )


def _figures(job: Job, outcome: Outcome, speed: Speed) -> dict[str, Any]:
    rate = outcome.tokens_per_second if outcome.intervals else None
    return {
        "train_flops_per_token": job.flops_per_token,
        "tokens": job.train.steps * speed.tokens_per_step,
        "steps": job.train.steps,
        **quality(outcome.validation),
        "measured": outcome.measured,
        "tokens_per_second": rate,
        "mfu": None if rate is None else speed.mfu(rate),
        "peak_flops": speed.peak.flops,
        "peak_source": speed.peak.source,
        "compile_seconds": outcome.compile_seconds,
    }


def quality(validation: dict[str, Any]) -> dict[str, Any]:
    """Select the validation figures that a summary keeps: every scalar metric, and expert use."""
    metrics = {name: value for name, value in validation.items() if isinstance(value, float)}
    return {"validation": metrics, "expert_use": expert_use(validation)}


def expert_use(validation: dict[str, Any]) -> list[list[float]] | None:
    """Share of the assignments by layer and expert, [N][E]; None for a dense model."""
    if "counts_NE" not in validation:
        return None
    counts = np.asarray(validation["counts_NE"], np.float64)
    return (counts / counts.sum(axis=1, keepdims=True)).round(6).tolist()
