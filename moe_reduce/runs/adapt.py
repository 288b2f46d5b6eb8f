"""An adaptation run: trains an adapter, or the whole base, and writes adapter/, the merged model/ and its reports."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, merging
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.budget import within_budget
from moe_reduce.adapters.checks import check_new, check_split
from moe_reduce.adapters.dropout import while_training
from moe_reduce.core import outputs, trees
from moe_reduce.core.config import AdaptConfig, AdapterConfig, ModelConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input, Step
from moe_reduce.data.batches import validation_batches
from moe_reduce.data.completions import Completions
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.prepare import prepare
from moe_reduce.data.shards import TokenSource
from moe_reduce.families import read_config
from moe_reduce.inference.evaluate import measure
from moe_reduce.inference.recall import recall
from moe_reduce.models import weights
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Records, abstract_params, parameter_count, records, stored_params
from moe_reduce.planning.flops import train_flops_per_token
from moe_reduce.quantization import fake
from moe_reduce.runs import equivalence, teaching
from moe_reduce.runs.workdir import alone, begin, describe, describe_data, finish, machine, writing
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import load
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import Job, fit, quality
from moe_reduce.training.losses import collapse, evaluator, next_token_loss, teacher_records
from moe_reduce.training.task import Task, every_leaf, never, nothing_else, split_teacher

SAMPLE_BATCHES = 4  # validation batches for the equivalence report
WELL_USED = 0.8  # share of a budget below which a note is printed


@alone
def adapt(run: AdaptConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Train, resume, or skip a finished run; returns the content of summary.json."""
    run, config = _resolved(run)
    run.mesh.check_fits(config)
    mesh = sharding.make_mesh(run.mesh)
    steps.check_batch(mesh, run.train)
    shardings = sharding.model_shardings(mesh, config)
    if run.adapter is not None:  # before any data is prepared
        check_new(run.adapter, config)
        check_split(run.adapter, config, run.mesh.tensor)
    teaching.check(run.distill, config, run.mesh)
    schemes = fake.parse(run.qat.schemes, config)
    done = begin(workdir, run)
    if done is not None:
        return done
    tokens, tokenizer = prepare(run.data, config.vocab_size)
    teaching.check_vocabulary(run.distill, tokenizer)
    test = _test_batches(run, config, mesh)  # before hours of training
    schedule = run.train.over(tokens.rows(TRAIN, run.data.sequence_length))
    with writing(workdir):
        base = load(run.model, None if run.dtype == "stored" else run.dtype, run.execution, shardings)
        if run.adapter is None and any(map(weights.is_quantised, trees.flatten(base.params).values())):
            raise UserError(f"model={run.model} is quantised, which cannot train: give an adapter, or its origin")
        start = base if run.adapter is None else adapters.activate(base, adapters.init(run.adapter, base))
        flops = None if run.adapter else train_flops_per_token(config, run.data.sequence_length)
        task = adapt_task(run, config, tokens)
        job = Job(task, config, start.params, run.execution, run.data, schedule, flops_per_token=flops)
        job, taught = teaching.prepared(teaching.planned(job, run.distill), run.distill, mesh, tokens)
        params, figures = fit(job, mesh, taught, workdir)
        for figure, share in figures["measured"].items():
            print(f"{figure}: {share:.1%}", flush=True)
        params = fake.quantised(params, config, schemes)
        figures["test"] = None if test is None else _measured(start.with_params(params), test, mesh)
        trained = base.with_params(_as_stored(sharding.to_host(mesh, params), start.params))
        return _finish(run, workdir, name, trained, tokens, figures)


def adapt_task(run: AdaptConfig, config: ModelConfig, tokens: TokenSource | None = None) -> Task:
    """Task that trains an adapter's leaves, or every leaf; it measures recall if `tokens` are completions."""
    execution = dataclasses.replace(run.execution, expert_gradients=run.adapter is None)
    skeleton = Model(config, {}, execution)
    distillation = teaching.distillation_of(run.distill, run.execution)

    def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = while_training(run.adapter, params, batch)
        return next_token_loss(skeleton, run.balance, distillation, params, batch)

    def measure_recall(params: Any) -> dict[str, float]:
        assert isinstance(tokens, Completions)
        return recall(skeleton.with_params(split_teacher(params)[0]), tokens, run.recall_pairs)

    task = Task(
        loss=loss,
        evaluate=evaluator(skeleton),
        records={**_records(config, run.adapter), **teacher_records(distillation)},
        trainable=every_leaf if run.adapter is None else partial(_trains, run.adapter),
        stop=partial(collapse, run.balance) if config.moe else never,
        measure=measure_recall if isinstance(tokens, Completions) else nothing_else,
    )
    return fake.quantisation_aware(task, config, fake.parse(run.qat.schemes, config))


def planned_job(run: AdaptConfig, config: ModelConfig, dtype: Any) -> Job:
    """The job of an adaptation on abstract leaves. config, dtype: of the base model; run.execution: resolved."""
    sized = dataclasses.replace(run, adapter=_sized(run, config)[0], budget=None)
    params = stored_params(config, dtype)
    if sized.adapter is not None:
        params[ADAPTER] = adapters.abstract(sized.adapter, config)
        check_split(sized.adapter, config, run.mesh.tensor)
    job = Job(adapt_task(sized, config), config, params, run.execution, run.data, run.train)
    return teaching.planned(job, run.distill)


def _test_batches(run: AdaptConfig, config: ModelConfig, mesh: jax.sharding.Mesh) -> list[Any] | None:
    """This process's rows of the whole test text, in batches; None if there is no test text."""
    if run.test_source is None:
        return None
    data = dataclasses.replace(
        run.data, source=run.test_source, validation_source=None, validation_fraction=1.0, max_documents=None
    )
    tokens, _ = prepare(data, config.vocab_size)
    return validation_batches(tokens, data, run.train.batch_size, sys.maxsize, *sharding.process_shard(mesh))


def _measured(model: Model, batches: list[Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    sums = measure(model, (sharding.put_batch(mesh, batch) for batch in batches), mesh)
    return quality(sums)["validation"] | {"tokens": sums["tokens"]}


def _records(config: ModelConfig, adapter: AdapterConfig | None) -> Records:
    leaves = abstract_params(config)
    return records(config, leaves if adapter is None else leaves | {ADAPTER: adapters.abstract(adapter, config)})


def _trains(config: AdapterConfig, path: str) -> bool:
    return path.startswith(f"{ADAPTER}/") and adapters.trained(config, path)


def _resolved(run: AdaptConfig) -> tuple[AdaptConfig, ModelConfig]:
    """Resolve every `auto`, `train` and budget of a run; return it with the architecture of the base."""
    config, _ = read_config(Path(run.model))
    adapter, allowed = _sized(run, config)
    if adapter is not None and allowed is not None:
        _print_budget(run, adapter, config, allowed)
    if adapter is not None:  # so that runs of different seeds also differ in the adapter
        adapter = dataclasses.replace(adapter, seed=adapter.seed + run.train.seed)
    base = manifest.input_of(Path(run.model)).sha256
    if run.base_sha256 not in (None, base):
        raise UserError(
            f"model={run.model} is another one than base_sha256 says (its hash is {base}): give the base with the hash "
            f"{run.base_sha256}"
        )
    tokenizer = run.model if run.data.tokenizer == "train" else run.data.tokenizer
    resolved = dataclasses.replace(
        run,
        adapter=adapter,
        budget=None,
        base_sha256=base,
        execution=run.execution.resolve(jax.default_backend()),
        data=dataclasses.replace(run.data, tokenizer=tokenizer),
        distill=teaching.resolved(run.distill),
    )
    return resolved, config


def _sized(run: AdaptConfig, config: ModelConfig) -> tuple[AdapterConfig | None, int | None]:
    """Size the adapter to the budget; return it with the number of parameters that the budget allows."""
    if run.budget is None or run.adapter is None:
        return run.adapter, None
    allowed = int(run.budget * parameter_count(config))
    return within_budget(run.adapter, config, allowed), allowed


def _print_budget(run: AdaptConfig, adapter: AdapterConfig, config: ModelConfig, allowed: int) -> None:
    name = "sketch_width" if adapter.method == "skema" else "rank"
    size, used = f"{name}={getattr(adapter, name)}", adapters.trained_parameters(adapter, config)
    print(
        f"budget {run.budget:.3%} of the base: {adapter.method} {size} trains {used:,} of {allowed:,} parameters",
        flush=True,
    )
    if used < WELL_USED * allowed:
        print(
            f"{size} is the largest for the narrowest target: compare with adapters of {used:,} trained parameters",
            flush=True,
        )


def _as_stored(params: Any, before: Any) -> dict[str, Any]:
    """Trained fp32 leaves, cast to the dtypes that they had before."""
    dtypes = {path: leaf.dtype for path, leaf in trees.flatten(before).items()}
    return trees.map_with_path(lambda path, leaf: weights.cast(leaf, dtypes[path]), params)


def _finish(
    run: AdaptConfig, workdir: Path, name: str, trained: Model, tokens: TokenSource, figures: dict[str, Any]
) -> dict[str, Any]:
    """Write adapter/, the merged model, its reports and the summary, which is returned."""
    assert run.base_sha256 is not None
    base_input = Input(run.model, run.base_sha256)
    count, stored, report = parameter_count(trained.config), trained, lambda: None
    if run.adapter is not None:
        adapter, base = Adapter(run.adapter, trained.params[ADAPTER]), merging.unmerge(trained)
        count, merged = adapters.count(adapter), merging.merge(base, adapter)
        stored = merging.requantised(merged, base, adapter)
        if jax.process_index() == 0:
            _write_adapter(adapter, base, base_input, workdir)
        sample = partial(validation_batches, tokens, run.data, run.train.batch_size, SAMPLE_BATCHES)
        report = partial(_report, workdir, base_input, (base, adapter, merged, stored), sample)
    total = parameter_count(stored.config)
    summary = {
        "name": name,
        "method": run.adapter.method if run.adapter else "full",
        "adapter": to_dict(run.adapter) if run.adapter else None,
        "learning_rate": run.train.learning_rate,
        "seed": run.train.seed,
        **describe(stored.config, stored.params),
        "trained_parameters": count,
        "trained_share": count / total,
        "optimizer_bytes": 8 * count,  # Adam's two moments in fp32
        **figures,
        **machine(),
        "data": describe_data(run.data, tokens) | {"test_source": run.test_source},
    }
    step = Step(
        command="adapt",
        arguments=to_dict(run),
        inputs=(base_input, Input(run.data.source, summary["data"]["fingerprint"]), *teaching.inputs(run.distill)),
        parameters_before=total,
        parameters_after=total,
        quality=summary["validation"] | summary["measured"],
    )
    finish(workdir, stored, step, summary, report)
    return summary


def _report(
    workdir: Path, base_input: Input, models: tuple[Model, Adapter, Model, Model], sample: Callable[[], list[Any]]
) -> None:
    """Write the merge reports; a difference above the tolerance prints a warning and the result stays.

    models: base, adapter, the merged model, and the model as it is stored: the merged one, or requantised.
    """
    base, adapter, merged, stored = models
    found = equivalence.equivalence(base, adapter, merged, sample())
    if stored is not merged:
        found["requantised"] = equivalence.requantising(merged, stored, sample())
        print(equivalence.shown(found["requantised"]), flush=True)
    described = manifest.read(workdir / "model")
    assert described is not None, "save wrote a manifest"
    equivalence.write_reports(workdir, described["files"], base_input, adapter, found)
    if not found["equivalent"]:
        print(
            "warning: the merged model differs from the adapted one by more than the tolerance: see "
            f"{workdir / equivalence.EQUIVALENCE}",
            flush=True,
        )


def _write_adapter(adapter: Adapter, base: Model, base_input: Input, workdir: Path) -> None:
    target = workdir / "adapter"
    # may replace the adapter of an interrupted attempt
    with outputs.directory(target, adapter_directory.KIND, overwrite=True) as unfinished:
        adapter_directory.save(adapter, base.config, base_input, unfinished)
