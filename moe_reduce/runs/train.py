"""One RunConfig -> a workdir: data, mesh, task, loop, then model/ and summary.json."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moe_reduce.core.config import RunConfig, to_dict
from moe_reduce.core.provenance import Input, Step
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.prepare import prepare
from moe_reduce.families import of_config
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.planning.flops import train_flops_per_token
from moe_reduce.quantization import fake
from moe_reduce.runs import teaching
from moe_reduce.runs.workdir import alone, begin, describe, describe_data, finish, machine, writing
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import Job, fit
from moe_reduce.training.losses import language_model_task


@alone
def train(run: RunConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Train from the start or from the newest checkpoint, unless the run is done; return the content of summary.json.

    name: the variant's name.
    """
    run = _resolved(run)
    mesh = sharding.make_mesh(run.mesh)
    sharding.model_shardings(mesh, run.model)  # refuse a mesh before the text is prepared
    of_config(run.model)  # refuse an unknown family
    teaching.check(run.distill, run.model, run.mesh)
    schemes = fake.parse(run.qat.schemes, run.model)
    steps.check_batch(mesh, run.train)
    done = begin(workdir, run)
    if done is not None:
        return done
    tokens, tokenizer = prepare(run.data, run.model.vocab_size)
    teaching.check_vocabulary(run.distill, tokenizer)
    rows = tokens.rows(TRAIN, run.data.sequence_length)
    job = pretraining(dataclasses.replace(run, train=run.train.over(rows)))
    with writing(workdir):
        job, taught = teaching.prepared(job, run.distill, mesh, tokens)
        params, figures = fit(job, mesh, taught, workdir)
        summary = {"name": name, **describe(run.model), "seed": run.train.seed, **figures, **machine()}
        summary["data"] = describe_data(run.data, tokens)
        step = Step(
            command="train",
            arguments=to_dict(run),
            inputs=(Input(run.data.source, summary["data"]["fingerprint"]), *teaching.inputs(run.distill)),
            parameters_before=0,
            parameters_after=summary["parameters"],
            quality=summary["validation"],
        )
        params = sharding.to_host(mesh, fake.quantised(params, run.model, schemes))
        finish(workdir, Model(run.model, params, run.execution, tokens.directory), step, summary)
    return summary


def _resolved(run: RunConfig) -> RunConfig:
    """Replace `auto`; a teacher's hash is recorded, and its tokenizer is the one of the text if none is named."""
    tokenizer = run.distill.teacher if run.distill.active and run.data.tokenizer == "train" else run.data.tokenizer
    return dataclasses.replace(
        run,
        execution=run.execution.resolve(jax.default_backend()),
        data=dataclasses.replace(run.data, tokenizer=tokenizer),
        distill=teaching.resolved(run.distill),
    )


def pretraining(run: RunConfig) -> Job:
    """Return the job of a run: all parameters of a new model, on the next token; a teacher's leaves are abstract.

    run.execution: resolved.
    """
    distillation = teaching.distillation_of(run.distill, run.execution)
    task = language_model_task(run.model, run.execution, run.balance, distillation)
    task = fake.quantisation_aware(task, run.model, fake.parse(run.qat.schemes, run.model))
    initial = partial(init_params, run.model, jax.random.key(run.train.seed))
    flops = train_flops_per_token(run.model, run.data.sequence_length)
    job = Job(task, run.model, initial, run.execution, run.data, run.train, flops_per_token=flops)
    return teaching.planned(job, run.distill)
