"""A reduction: stages that run one after the other, each resumable, each with a model directory and figures."""

import contextlib
import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moe_reduce.core import disk
from moe_reduce.core.config import ModelConfig, ReduceConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.data.batches import validation_batches
from moe_reduce.data.prepare import prepare
from moe_reduce.data.shards import TokenSource
from moe_reduce.families import read_config
from moe_reduce.inference.evaluate import measure
from moe_reduce.models.model import Model
from moe_reduce.reduction.transform import expert_count
from moe_reduce.reports import reduction_picture
from moe_reduce.runs import teaching
from moe_reduce.runs.stages import RunContext, configurations, run_stage
from moe_reduce.runs.workdir import (
    SUMMARY,
    alone,
    begin,
    describe,
    describe_data,
    finish,
    finished,
    machine,
    read_run_config,
    writing,
)
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import load
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import quality

FIRST = "original"  # name of the model that a reduction begins with, as stage 0
MODEL_HASH = "model_sha256"  # hash of that model, in its summary


@alone
def reduce(run: ReduceConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Run the stages that are not done yet; return the content of summary.json.

    name: the variant's name. Raises UserError before any weight is read when a stage cannot follow those before it.
    """
    run = _resolved(run)
    mesh = sharding.make_mesh(run.mesh)
    steps.check_batch(mesh, run.train)
    first, _ = read_config(Path(run.model))
    _check_architecture(run, first)
    for config in [first, *(config for _, config in configurations(first, run))]:
        run.mesh.check_fits(config)
        sharding.model_shardings(mesh, config)
    done = begin(workdir, run)
    _check_first(run, workdir)
    if done is not None:
        return done
    tokens, _ = prepare(run.data, first.vocab_size)
    with writing(workdir):  # outside the mesh: abstract initialisation runs on one token, which a mesh cannot divide
        reduction = Reduction(run, workdir, mesh, tokens)
        reduction.say_where_it_resumes()
        summaries = [reduction.measure_first(), *map(reduction.stage, range(1, len(run.stages) + 1))]
        total = {"name": name, "seed": run.train.seed, "stages": summaries, **machine()}
        total["data"] = describe_data(run.data, tokens)
        if jax.process_index() == 0:
            reduction_picture.picture(summaries, workdir / "loss.png")
            _link_result(run, workdir)
            disk.write_json(workdir / SUMMARY, total)
    return total


def _resolved(run: ReduceConfig) -> ReduceConfig:
    """Replace `auto` and `train` by their resolved values."""
    tokenizer = run.model if run.data.tokenizer == "train" else run.data.tokenizer
    return dataclasses.replace(
        run,
        execution=run.execution.resolve(jax.default_backend()),
        data=dataclasses.replace(run.data, tokenizer=tokenizer),
    )


def _check_architecture(run: ReduceConfig, found: ModelConfig) -> None:
    def comparable(config: ModelConfig) -> ModelConfig:
        # how a model was initialised, and how long its texts may be, does not change what it is
        return dataclasses.replace(config, init_std=1.0, max_positions=1)

    if run.architecture is not None and comparable(run.architecture) != comparable(found):
        raise UserError(f"model={run.model} has another architecture than the key `architecture`: correct one of them")


def _check_first(run: ReduceConfig, workdir: Path) -> None:
    """Raises UserError when `model` holds other weights than those that the workdir began with."""
    noted = finished(_stage_directory(run, workdir, 0)) or {}
    if noted.get(MODEL_HASH) not in (None, manifest.input_of(Path(run.model)).sha256):
        raise UserError(
            f"model={run.model} is another one than --workdir={workdir} began with: put that model back, or choose "
            "another workdir"
        )


def _stage_directory(run: ReduceConfig, workdir: Path, number: int) -> Path:
    """Directory of a stage; stages are numbered from 1, and 0 is the first model."""
    return workdir / f"{number:02d}-{[FIRST, *run.stages][number]}"


def _model_directory(run: ReduceConfig, workdir: Path, number: int) -> Path:
    return _stage_directory(run, workdir, number) / "model" if number else Path(run.model)


@dataclass(frozen=True)
class Reduction:
    """A reduction running in its workdir. Stages are numbered from 1; 0 is the model that it begins with."""

    run: ReduceConfig
    workdir: Path
    mesh: jax.sharding.Mesh
    tokens: TokenSource

    def directory(self, number: int) -> Path:
        """Directory of a stage."""
        return _stage_directory(self.run, self.workdir, number)

    def load(self, number: int) -> Model:
        """Load the model after a stage onto the mesh."""
        directory = _model_directory(self.run, self.workdir, number)
        shardings = sharding.model_shardings(self.mesh, read_config(directory)[0])
        # only the first model is cast: parameters trained since stay in fp32
        cast = self.run.dtype if self.run.dtype != "stored" and number == 0 else None
        return load(directory, cast, self.run.execution, shardings)

    def say_where_it_resumes(self) -> None:
        """Print the first stage that is not done, if an earlier call began the reduction."""
        done = [finished(self.directory(number)) is not None for number in range(len(self.run.stages) + 1)]
        if done[0] and not all(done) and jax.process_index() == 0:
            number = done.index(False)
            print(f"{self.workdir} resumes at stage {number} of {len(done) - 1}, {[*self.run.stages][number - 1]}")

    def measure_first(self) -> dict[str, Any]:
        """Return the summary of the first model, which is measured once."""
        directory = self.directory(0)
        done = finished(directory)
        if done is not None:
            return done
        made_from = {MODEL_HASH: manifest.input_of(Path(self.run.model)).sha256}
        summary = {"tokens": 0} | self.measure(FIRST, "", self.load(0)) | made_from
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            disk.write_json(directory / SUMMARY, summary)
        return summary

    def stage(self, number: int) -> dict[str, Any]:
        """Run a stage unless it is done here or in a sibling variant; return its summary."""
        name, entry = list(self.run.stages.items())[number - 1]
        directory = self.directory(number)
        if jax.process_index() == 0:
            _take_over(self.run, self.workdir, number)
        done = finished(directory)
        if done is not None:
            return done
        print(f"-- {name}", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.load(number - 1)
        first, _ = read_config(Path(self.run.model))
        loading = partial(teaching.load_teacher, execution=self.run.execution, mesh=self.mesh)
        context = RunContext(self.run, name, first, lambda: self.load(0), loading, self.mesh, self.tokens, directory)
        result = run_stage(entry, model, context)
        # measured again: saving may round parameters to their stored dtype
        summary = result.figures | self.measure(name, entry.kind, result.model)
        step = Step(
            command="reduce",
            arguments=dataclasses.asdict(entry),
            inputs=(manifest.input_of(_model_directory(self.run, self.workdir, number - 1)),),
            parameters_before=describe(model.config)["parameters"],
            parameters_after=summary["parameters"],
            quality=summary["validation"],
            kept_experts=result.kept_experts,
        )
        whole = sharding.to_host(self.mesh, result.model.params)
        finish(directory, dataclasses.replace(result.model, params=whole), step, summary)
        return summary

    def measure(self, name: str, kind: str, model: Model) -> dict[str, Any]:
        """Measure a model on the validation text; return the summary of the stage that made it."""
        started, run = time.time(), self.run
        shard = sharding.process_shard(self.mesh)
        batches = validation_batches(self.tokens, run.data, run.train.batch_size, run.train.evaluate_batches, *shard)
        validation = measure(model, (sharding.put_batch(self.mesh, batch) for batch in batches), self.mesh)
        return {
            "name": name,
            "kind": kind,
            **describe(model.config, model.params),
            "experts": expert_count(model.config),
            **quality(validation),
            "evaluation_seconds": time.time() - started,
        }


def _take_over(run: ReduceConfig, workdir: Path, number: int) -> None:
    """Link a stage that a sibling variant has finished from the same start, instead of running it again."""
    directory = _stage_directory(run, workdir, number)
    beginning, source = _beginning(to_dict(run), number), _model_directory(run, workdir, number - 1)
    for config in sorted(workdir.parent.glob("*/config.json")):
        done = config.parent / directory.name
        if directory.exists() or not (done / SUMMARY).is_file():
            continue
        if _beginning_of_file(config, number) == beginning and _made_from(done, source):
            print(f"-- {directory.name} is that of {config.parent}: linked, not run again", flush=True)
            with disk.temporary_beside(directory) as unfinished:
                # finished files are only ever replaced, never changed in place, so that links are safe
                whole = unfinished / directory.name
                shutil.copytree(done, whole, copy_function=_link, ignore=shutil.ignore_patterns("checkpoints"))
                disk.publish(whole, directory)


def _made_from(done: Path, source: Path) -> bool:
    """Return whether a stage's model was made from the present content of `source`, compared by hash."""
    chain = manifest.read_chain(done / "model")
    return bool(chain) and chain[-1].inputs[0].sha256 == manifest.input_of(source).sha256


def _beginning(run: dict[str, Any], number: int) -> Any:
    """Return the part of a configuration, as nested values, that decides the results of the first `number` stages."""
    order = run["order"].split(",")[:number] if "order" in run else None
    rest = {key: value for key, value in run.items() if key not in ("order", "stages")}
    return rest, order, [run["stages"][name] for name in order] if order and "stages" in run else None


def _beginning_of_file(config: Path, number: int) -> Any:
    """Return `_beginning` of another workdir; None where its config.json describes no reduction."""
    try:
        return _beginning(read_run_config(config, ReduceConfig), number)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _link_result(run: ReduceConfig, workdir: Path) -> None:
    """Link model/, which every finished workdir has, to the last stage's model, if the disk supports links."""
    link = workdir / ".model"
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        last = _model_directory(run, workdir, len(run.stages))
        link.symlink_to(last.relative_to(workdir), target_is_directory=True)
        link.replace(workdir / "model")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the disk has no links
        shutil.copy2(source, target)
