"""One AdaptConfig -> a workdir: an adapter (or the whole base) trained, adapter/, model/ merged, and what shows it."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, merging
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.budget import within_budget
from moe_reduce.adapters.checks import check_split
from moe_reduce.core import disk, trees
from moe_reduce.core.config import AdaptConfig, AdapterConfig, ModelConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input, Step
from moe_reduce.core.validation import check_mesh
from moe_reduce.data.batches import fingerprint, validation_batches
from moe_reduce.data.completions import Completions
from moe_reduce.data.prepare import prepare
from moe_reduce.data.shards import TokenSource
from moe_reduce.inference.evaluate import measure
from moe_reduce.inference.recall import recall
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Records, abstract_params, parameter_count, records, stored_params
from moe_reduce.planning.flops import train_flops_per_token
from moe_reduce.runs import equivalence
from moe_reduce.runs.workdir import begin, describe, finish, machine, writing
from moe_reduce.storage import manifest
from moe_reduce.storage.hf_config import read_config
from moe_reduce.storage.model_directory import load
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import Job, fit, quality
from moe_reduce.training.losses import collapse, evaluator, predict
from moe_reduce.training.task import Task, every_leaf, never, nothing_else

SAMPLE_BATCHES = 4  # of the validation split, for the equivalence report


def adapt(run: AdaptConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Trains, or goes on, or finds it done; returns the content of summary.json."""
    run, config = _resolved(run)
    check_mesh(run.mesh, config)
    mesh = sharding.make_mesh(run.mesh)
    steps.check_batch(mesh, run.train)
    shardings = sharding.model_shardings(mesh, config)
    if run.adapter is not None:
        adapters.abstract(run.adapter, config)  # refused before anything is prepared
        check_split(run.adapter, config, run.mesh.tensor)
    done = begin(workdir, run)
    if done is not None:
        return done
    tokens, _ = prepare(run.data, config.vocab_size)
    test = _test_batches(run, config, mesh)  # read before hours of training
    with writing(workdir):
        base = load(run.model, None if run.dtype == "stored" else run.dtype, run.execution, shardings)
        start = base if run.adapter is None else adapters.activate(base, adapters.init(run.adapter, base))
        task = adapt_task(run, config, tokens)
        length = run.data.sequence_length
        flops = None if run.adapter else train_flops_per_token(config, length)
        job = Job(task, config, start.params, run.execution, run.data, run.train, flops_per_token=flops)
        params, figures = fit(job, mesh, tokens, workdir)
        for split in ("recall_train", "recall_validation"):
            if split in figures["measured"]:
                print(f"{split}: {figures['measured'][split]:.1%}", flush=True)
        figures["test"] = None
        if test is not None:
            finished = dataclasses.replace(start, params=params)
            sums = measure(finished, (sharding.put_batch(mesh, batch) for batch in test), mesh)
            figures["test"] = quality(sums)["validation"] | {"tokens": sums["tokens"]}
        params = _as_stored(sharding.to_host(mesh, params), start.params)
        return _finish(run, workdir, name, dataclasses.replace(base, params=params), tokens, figures)


def _test_batches(run: AdaptConfig, config: ModelConfig, mesh: jax.sharding.Mesh) -> list[Any] | None:
    """This process's share of the whole of another text."""
    if run.test_source is None:
        return None
    data = dataclasses.replace(
        run.data, source=run.test_source, validation_source=None, validation_fraction=1.0, max_documents=None
    )
    tokens, _ = prepare(data, config.vocab_size)
    return validation_batches(tokens, data, run.train.batch_size, sys.maxsize, *sharding.batch_share(mesh))


def adapt_task(run: AdaptConfig, config: ModelConfig, tokens: TokenSource | None = None) -> Task:
    """What trains: an adapter's own leaves, or without one every leaf. tokens: completions are asked for."""
    chosen = run.adapter
    execution = dataclasses.replace(run.execution, expert_gradients=chosen is None)
    skeleton = Model(config, {}, execution)

    def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, penalty, metrics = predict(skeleton.with_params(params), run.balance, batch)
        return metrics["loss"] + penalty, metrics

    return Task(
        loss=loss,
        evaluate=evaluator(skeleton),
        records=_records(config, chosen),
        trainable=every_leaf if chosen is None else partial(_trains, chosen),
        stop=partial(collapse, run.balance) if config.moe else never,
        measure=partial(recall, config, execution, data=tokens, most=run.recall_pairs)
        if isinstance(tokens, Completions)
        else nothing_else,
    )


def _records(config: ModelConfig, chosen: AdapterConfig | None) -> Records:
    leaves = abstract_params(config)
    return records(config, leaves if chosen is None else leaves | {ADAPTER: adapters.abstract(chosen, config)})


def _trains(config: AdapterConfig, path: str) -> bool:
    return path.startswith(f"{ADAPTER}/") and adapters.trained(config, path)


def _resolved(run: AdaptConfig) -> tuple[AdaptConfig, ModelConfig]:
    """No `auto`, `train` or budget left, and the architecture of the base."""
    config, _ = read_config(Path(run.model))
    chosen, allowed = _sized(run, config)
    if allowed is not None and chosen is not None:
        size = f"sketch_width={chosen.sketch_width}" if chosen.method == "skema" else f"rank={chosen.rank}"
        used = adapters.trained_parameters(chosen, config)
        print(
            f"budget {run.budget:.3%} of the base: {used:,} of {allowed:,} parameters, {chosen.method} {size}",
            flush=True,
        )
        if used < 0.8 * allowed:
            print(f"the narrowest target ends {size} there: compare at the {used:,} parameters that train", flush=True)
    if chosen is not None:  # seeds of a run differ in everything that is random
        chosen = dataclasses.replace(chosen, seed=chosen.seed + run.train.seed)
    base = manifest.input_of(Path(run.model)).sha256
    if run.base_sha256 not in (None, base):
        raise UserError(f"model={run.model} is another one than base_sha256 says ({base}): give the base that it names")
    tokenizer = run.model if run.data.tokenizer == "train" else run.data.tokenizer
    resolved = dataclasses.replace(
        run,
        adapter=chosen,
        budget=None,
        base_sha256=base,
        execution=run.execution.resolve(jax.default_backend()),
        data=dataclasses.replace(run.data, tokenizer=tokenizer),
    )
    return resolved, config


def _sized(run: AdaptConfig, config: ModelConfig) -> tuple[AdapterConfig | None, int | None]:
    """(the adapter with its rank or width, the parameters that a budget allows it)."""
    if run.budget is None or run.adapter is None:
        return run.adapter, None
    allowed = int(run.budget * parameter_count(config))
    return within_budget(run.adapter, config, allowed), allowed


def planned_job(run: AdaptConfig, config: ModelConfig, dtype: Any) -> Job:
    """What an adaptation trains, on abstract leaves of a dtype. config: of the base; run.execution: resolved."""
    sized = dataclasses.replace(run, adapter=_sized(run, config)[0], budget=None)
    params = stored_params(config, dtype)
    if sized.adapter is not None:
        params[ADAPTER] = adapters.abstract(sized.adapter, config)
        check_split(sized.adapter, config, run.mesh.tensor)
    return Job(adapt_task(sized, config), config, params, run.execution, run.data, run.train)


def _as_stored(params: Any, before: Any) -> dict[str, Any]:
    """Trained in fp32, kept in the dtype of the base."""
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(before).items()}
    return trees.map_with_path(lambda path, leaf: leaf.astype(dtypes[path]), params)


def _finish(
    run: AdaptConfig, workdir: Path, name: str, active: Model, tokens: TokenSource, figures: dict[str, Any]
) -> dict[str, Any]:
    assert run.base_sha256 is not None
    base_input = Input(run.model, run.base_sha256)
    trained, merged, report = parameter_count(active.config), active, partial(lambda: None)
    if run.adapter is not None:
        adapter = Adapter(run.adapter, active.params[ADAPTER])
        base = merging.unmerge(active)
        trained, merged = adapters.count(adapter), merging.merge(base, adapter)
        if jax.process_index() == 0:
            _write_adapter(adapter, base, base_input, workdir)
        report = partial(_report, workdir, base_input, base, adapter, merged, tokens, run)
    total = parameter_count(merged.config)
    summary = {
        "name": name,
        "method": run.adapter.method if run.adapter else "full",
        "adapter": to_dict(run.adapter) if run.adapter else None,
        "learning_rate": run.train.learning_rate,
        "seed": run.train.seed,
        **describe(merged.config),
        "trained_parameters": trained,
        "trained_share": trained / total,
        "optimizer_bytes": 8 * trained,  # two moments in fp32
        **figures,
        **machine(),
    }
    step = Step(
        command="adapt",
        arguments=to_dict(run),
        inputs=(base_input, Input(run.data.source, fingerprint(tokens, run.data))),
        parameters_before=total,
        parameters_after=total,
        quality=summary["validation"] | summary["measured"],
    )
    finish(workdir, merged, step, summary, report)
    return summary


def _report(
    workdir: Path,
    base_input: Input,
    base: Model,
    adapter: Adapter,
    merged: Model,
    tokens: TokenSource,
    run: AdaptConfig,
) -> None:
    """By the first process alone; what does not come out as equivalent is reported, and nothing is lost."""
    batches = validation_batches(tokens, run.data, run.train.batch_size, SAMPLE_BATCHES)
    found = equivalence.equivalence(base, adapter, merged, batches)
    described = manifest.read(workdir / "model")
    assert described is not None, "what save wrote"
    equivalence.write_reports(workdir, described["files"], base_input, adapter, found)
    if not found["equivalent"]:
        print(f"NOT EQUIVALENT: see {workdir / equivalence.EQUIVALENCE}", flush=True)


def _write_adapter(adapter: Adapter, base: Model, base_input: Input, workdir: Path) -> None:
    target = workdir / "adapter"
    with disk.temporary_beside(target) as unfinished:
        adapter_directory.save(adapter, base.config, base_input, unfinished)
        disk.replace_directory(unfinished, target)  # that of an earlier attempt, stopped behind it, goes
