"""A reduction: stage after stage, each resumable, each with a model directory, figures and a place in the chain."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moe_reduce.core import config_dict, disk
from moe_reduce.core.config import ModelConfig, ReduceConfig, Stage, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.data.batches import validation_batches
from moe_reduce.data.prepare import prepare
from moe_reduce.data.shards import TokenSource
from moe_reduce.families import read_config
from moe_reduce.inference.evaluate import measure
from moe_reduce.models.model import Model
from moe_reduce.reports import reduction_pictures as pictures
from moe_reduce.reports.run_table import align
from moe_reduce.runs.stages import Place, check_origins, configurations, experts_of, run_stage
from moe_reduce.runs.workdir import SUMMARY, begin, describe, finish, finished, machine, writing
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import load
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import quality

FIRST = "original"
MODEL_HASH = "model_sha256"  # of the first model, in its summary


def reduce(run: ReduceConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Runs the stages that are not done yet; returns the content of summary.json."""
    run = _resolved(run)
    mesh = sharding.make_mesh(run.mesh)
    steps.check_batch(mesh, run.train)
    first_config, _ = read_config(Path(run.model))
    _check_architecture(run, first_config)
    for _, config in [("", first_config), *configurations(first_config, run)]:
        run.mesh.check_fits(config)
        sharding.model_shardings(mesh, config)
    check_origins(run, first_config, manifest.read_chain(Path(run.model)))
    done = begin(workdir, run)
    _check_first(run, workdir)
    if done is not None:
        return done
    tokens, _ = prepare(run.data, first_config.vocab_size)
    with writing(workdir):  # not within the mesh: abstract initialisation runs on one token, which it could not divide
        summaries = [_first(run, mesh, tokens, workdir)]
        for number, (stage_name, stage) in enumerate(run.stages.items(), start=1):
            summaries.append(_stage(run, mesh, tokens, workdir, number, stage_name, stage))
        total = {"name": name, "seed": run.train.seed, "stages": summaries, **machine()}
        if jax.process_index() == 0:
            pictures.reduction_picture(summaries, workdir / "loss.png")
            _name_result(run, workdir)
            disk.write_json(workdir / SUMMARY, total)
    return total


def _check_architecture(run: ReduceConfig, found: ModelConfig) -> None:
    # how a model was initialised, and how long its texts may be, does not change what it is
    same = dataclasses.replace(found, init_std=1.0, max_positions=1)
    if (
        run.architecture not in (None, found)
        and dataclasses.replace(run.architecture, init_std=1.0, max_positions=1) != same
    ):
        raise UserError(f"model={run.model} is another architecture than `architecture` says: correct one of them")


def _resolved(run: ReduceConfig) -> ReduceConfig:
    tokenizer = run.model if run.data.tokenizer == "train" else run.data.tokenizer
    return dataclasses.replace(
        run,
        execution=run.execution.resolve(jax.default_backend()),
        data=dataclasses.replace(run.data, tokenizer=tokenizer),
    )


def _stage_directory(workdir: Path, number: int, name: str) -> Path:
    return workdir / f"{number:02d}-{name}"


def _model_directory(run: ReduceConfig, workdir: Path, number: int) -> Path:
    if number == 0:
        return Path(run.model)
    return _stage_directory(workdir, number, list(run.stages)[number - 1]) / "model"


def _load(run: ReduceConfig, mesh: jax.sharding.Mesh, directory: Path) -> Model:
    shardings = sharding.model_shardings(mesh, read_config(directory)[0])
    # cast once: what trained since is kept in fp32
    cast = run.dtype if run.dtype != "stored" and directory == Path(run.model) else None
    return load(directory, cast, run.execution, shardings)


def _check_first(run: ReduceConfig, workdir: Path) -> None:
    """Raises UserError when `model` holds other weights than those that the workdir began with."""
    noted = finished(_stage_directory(workdir, 0, FIRST)) or {}
    if noted.get(MODEL_HASH) not in (None, manifest.input_of(Path(run.model)).sha256):
        raise UserError(f"model={run.model} is another one than --workdir={workdir} began with: choose another workdir")


def _first(run: ReduceConfig, mesh: jax.sharding.Mesh, tokens: TokenSource, workdir: Path) -> dict[str, Any]:
    directory = _stage_directory(workdir, 0, FIRST)
    done = finished(directory)
    if done is not None:
        return done
    model = _load(run, mesh, Path(run.model))
    made_from = {MODEL_HASH: manifest.input_of(Path(run.model)).sha256}
    summary = {"tokens": 0} | _summary(FIRST, "", model, run, mesh, tokens) | made_from
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        disk.write_json(directory / SUMMARY, summary)
    return summary


def _stage(
    run: ReduceConfig, mesh: jax.sharding.Mesh, tokens: TokenSource, workdir: Path, number: int, name: str, stage: Stage
) -> dict[str, Any]:
    directory = _stage_directory(workdir, number, name)
    if jax.process_index() == 0:
        _take_over(run, workdir, number)
    done = finished(directory)
    if done is not None:
        return done
    print(f"-- {name}", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    source = _model_directory(run, workdir, number - 1)
    model = _load(run, mesh, source)
    before = describe(model.config)["parameters"]
    first_config, _ = read_config(Path(run.model))
    place = Place(run, name, mesh, tokens, first_config, partial(_load, run, mesh, Path(run.model)), directory)
    result = run_stage(stage, model, place)
    # measured anew: what is saved may be rounded to the dtype that it was stored in
    summary = result.figures | _summary(name, stage.kind, result.model, run, mesh, tokens)
    step = Step(
        command="reduce",
        arguments=dataclasses.asdict(stage),
        inputs=(manifest.input_of(source),),
        parameters_before=before,
        parameters_after=summary["parameters"],
        quality=summary["validation"],
        kept_experts=result.kept_experts,
    )
    whole = sharding.to_host(mesh, result.model.params)
    finish(directory, dataclasses.replace(result.model, params=whole), step, summary)
    return summary


def _take_over(run: ReduceConfig, workdir: Path, number: int) -> None:
    """A stage that a variant beside this one has done, from the same beginning, is not done again but linked."""
    directory = _stage_directory(workdir, number, list(run.stages)[number - 1])
    beginning, source = _beginning(to_dict(run), number), _model_directory(run, workdir, number - 1)
    for config in sorted(workdir.parent.glob("*/config.json")):
        done = config.parent / directory.name
        if directory.exists() or not (done / SUMMARY).is_file():
            continue
        other = config_dict.completed(ReduceConfig, json.loads(config.read_text()))
        if _beginning(other, number) == beginning and _made_from(done, source):
            print(f"-- {directory.name} is that of {config.parent}", flush=True)
            with disk.temporary_beside(directory) as unfinished:
                # what is finished is only ever replaced, never changed in place
                whole = unfinished / directory.name
                shutil.copytree(done, whole, copy_function=_link, ignore=shutil.ignore_patterns("checkpoints"))
                whole.rename(directory)


def _made_from(done: Path, source: Path) -> bool:
    """Whether the stage's model says that it was made from just this one, and not from another that lay there then."""
    chain = manifest.read_chain(done / "model")
    return bool(chain) and chain[-1].inputs[0].sha256 == manifest.input_of(source).sha256


def _beginning(run: dict[str, Any], number: int) -> Any:
    """What decides the outcome of the first stages of a reduction, of nested values as in config.json."""
    order = run["order"].split(",")[:number] if "order" in run else None
    rest = {key: value for key, value in run.items() if key not in ("order", "stages")}
    return rest, order, [run["stages"][name] for name in order] if order and "stages" in run else None


def _name_result(run: ReduceConfig, workdir: Path) -> None:
    """model/, as in every workdir of a run: a link to the last stage's, where the disk has links."""
    name = workdir / "model"
    with contextlib.suppress(OSError):
        name.unlink(missing_ok=True)
        name.symlink_to(_model_directory(run, workdir, len(run.stages)).relative_to(workdir), target_is_directory=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk that has no links
        shutil.copy2(source, target)


def _summary(
    name: str, kind: str, model: Model, run: ReduceConfig, mesh: jax.sharding.Mesh, tokens: TokenSource
) -> dict[str, Any]:
    started = time.time()
    share = sharding.batch_share(mesh)
    batches = validation_batches(tokens, run.data, run.train.batch_size, run.train.evaluate_batches, *share)
    validation = measure(model, (sharding.put_batch(mesh, batch) for batch in batches), mesh)
    return {
        "name": name,
        "kind": kind,
        **describe(model.config),
        "experts": experts_of(model.config),
        **quality(validation),
        "evaluation_seconds": time.time() - started,
    }


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """A row for each stage of each reduction."""
    rows = [("", ["experts", "parameters", "loss", "gap", "accuracy", "tokens"])]
    for name, summary in summaries.items():
        first = summary["stages"][0]["validation"]["loss"]
        for stage in summary["stages"]:
            validation = stage["validation"]
            cells = [
                f"{stage['experts']:,}",
                f"{stage['parameters']:,}",
                f"{validation['loss']:.4f}",
                f"{validation['loss'] - first:+.4f}",
                f"{validation['accuracy']:.2%}",
                f"{stage['tokens']:,}",
            ]
            rows.append((f"{name} {stage['name']}".strip(), cells))
    return align(rows)
