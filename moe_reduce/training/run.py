"""One RunConfig -> a workdir: data, mesh, task, loop, then model/ and summary.json."""

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_reduce import disk, planning
from moe_reduce.config import ModelConfig, RunConfig, to_dict
from moe_reduce.data.batches import train_batches, validation_batches
from moe_reduce.data.prepare import prepare
from moe_reduce.data.shards import TokenSource
from moe_reduce.errors import UserError
from moe_reduce.models.decoder import abstract_params, init_params
from moe_reduce.storage.manifest import Step
from moe_reduce.storage.model import Model, save
from moe_reduce.training import sharding, steps
from moe_reduce.training.loop import Fit, Outcome, Speed
from moe_reduce.training.losses import language_model_task
from moe_reduce.training.throughput import peak

SUMMARY = "summary.json"


def train(run: RunConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Trains, or goes on, or finds it done; returns the content of summary.json."""
    run = dataclasses.replace(run, execution=run.execution.resolve(jax.default_backend()))
    mesh = sharding.make_mesh(run.mesh)
    sharding.shardings(mesh, abstract_params(run.model))  # refused before anything is prepared
    steps.check_batch(mesh, run.train)
    claim(workdir, run)
    if _first_process_says((workdir / SUMMARY).exists()):
        print(f"{workdir} is done: nothing to do (a new --workdir starts again)")
        return json.loads((workdir / SUMMARY).read_text()) if (workdir / SUMMARY).exists() else {}
    tokens, _ = prepare(run.data, run.model.vocab_size)
    flops = planning.train_flops_per_token(run.model, run.data.sequence_length)
    speed = Speed(
        run.train.batch_size * run.data.sequence_length,
        flops,
        peak(list(mesh.devices.flat), run.execution.compute_dtype),
    )
    started = time.time()
    with disk.writing(f"below {workdir}", "free some space, then run the same command again to go on"):
        outcome = _fit(run, mesh, tokens, speed, workdir).run()
        summary = _summary(run, name, outcome, speed, time.time() - started)
        _save(run, mesh, workdir, outcome, summary, getattr(tokens, "directory", None))
    if jax.process_count() > 1:  # none leaves, and takes the others' connection down, before the result is written
        multihost_utils.sync_global_devices("result written")
    return summary


def _first_process_says(value: bool) -> bool:
    """The first process's value on all: disks differ, or show each other's files late, and all must do the same."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _fit(run: RunConfig, mesh: Mesh, tokens: TokenSource, speed: Speed, workdir: Path) -> Fit:
    share = sharding.batch_share(mesh)
    return Fit(
        task=language_model_task(run.model, run.execution, run.balance),
        initial=partial(init_params, run.model, jax.random.key(run.train.seed)),
        frozen={},
        train=run.train,
        mesh=mesh,
        batches=train_batches(tokens, run.data, run.train.batch_size, run.train.seed, *share),
        validation=validation_batches(tokens, run.data, run.train.batch_size, run.train.evaluate_batches, *share),
        workdir=workdir,
        speed=speed,
    )


def claim(workdir: Path, run: RunConfig) -> None:
    """Makes the workdir this run's; raises UserError when it is another configuration's, or cannot be written.

    A run that ended before its first step, as for a missing corpus, may be corrected and started in the same place.
    """
    file = workdir / "config.json"
    wanted = to_dict(run)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text()) if file.exists() else wanted
        difference = _first_difference(found, wanted)
        began = (workdir / "metrics.jsonl").exists() or set(found) != set(wanted)
        if difference and began:
            raise UserError(
                f"--workdir={workdir} belongs to another configuration ({difference}): choose another workdir"
            )
        if difference or not file.exists():
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


def _summary(run: RunConfig, name: str, outcome: Outcome, speed: Speed, seconds: float) -> dict[str, Any]:
    rate = outcome.tokens_per_second
    trained = bool(outcome.intervals)
    return {
        "name": name,
        **describe(run.model),
        "train_flops_per_token": speed.flops_per_token,
        "tokens": run.train.steps * speed.tokens_per_step,
        "steps": run.train.steps,
        "seed": run.train.seed,
        "validation": {k: outcome.validation[k] for k in ("loss", "perplexity", "accuracy")},
        "expert_use": expert_use(outcome.validation),
        "tokens_per_second": rate if trained else None,
        "mfu": rate * speed.flops_per_token / speed.peak.flops if trained else None,
        "peak_flops": speed.peak.flops,
        "peak_source": speed.peak.source,
        "compile_seconds": outcome.compile_seconds,
        "seconds": seconds,
        "machine": f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "jax": jax.__version__,
    }


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


def _save(
    run: RunConfig, mesh: Mesh, workdir: Path, outcome: Outcome, summary: dict[str, Any], source: Path | None
) -> None:
    """model/ first, summary.json last: its presence means that the run is done."""
    whole = jax.jit(lambda params: params, out_shardings=sharding.replicated(mesh))(outcome.params)
    if jax.process_index() == 0:
        params = jax.tree.map(np.asarray, whole)
        step = Step(
            command="train",
            arguments=to_dict(run),
            inputs=(),
            parameters_before=0,
            parameters_after=summary["parameters"],
            quality=summary["validation"],
        )
        model = Model(run.model, params, run.execution, source=source)
        save(model, workdir / "model", step, overwrite=True)
        disk.write_json(workdir / SUMMARY, summary)
