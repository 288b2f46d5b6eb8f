"""One run of Text-to-LoRA: TextToLoraConfig -> a workdir with adapters/ or hypernetwork/, and summary.json."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import adapter_directory, bank
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.checks import check_new
from moe_reduce.adapters.hypernetwork import directory as hypernetwork_directory
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork import rows
from moe_reduce.adapters.hypernetwork import splits as task_splits
from moe_reduce.adapters.hypernetwork.directory import Trained
from moe_reduce.adapters.hypernetwork.hypernetwork import HYPERNETWORK, Hypernetwork
from moe_reduce.core import disk, outputs
from moe_reduce.core.config import DataConfig, ModelConfig, TextToLoraConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.families import read_config
from moe_reduce.models.deltas import ADAPTER, BANK
from moe_reduce.models.model import Model
from moe_reduce.runs.text_to_lora import material, objectives
from moe_reduce.runs.text_to_lora.material import Material, Tasks
from moe_reduce.runs.workdir import SUMMARY, alone, begin, machine, writing
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import load
from moe_reduce.training import sharding, steps
from moe_reduce.training.job import Job, fit_batches
from moe_reduce.training.loop import Feed
from moe_reduce.training.task import Params, Task

ADAPTERS, RESULT, SPLITS = "adapters", "hypernetwork", "splits.json"
MULTITASK = "multitask"  # adapter of all tasks, below ADAPTERS


@dataclass(frozen=True, eq=False)
class Setup:
    """A resolved run with all that it reads."""

    run: TextToLoraConfig
    model: ModelConfig
    tasks: Tasks
    material: Material
    workdir: Path

    @property
    def base(self) -> Input:
        """The base by path and hash."""
        assert self.run.base_sha256 is not None
        return Input(self.run.model, self.run.base_sha256)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks that train."""
        return tuple(task.name for task in self.material.training)

    @property
    def seed(self) -> int:
        """Seed of the initial network: runs of different seeds start differently."""
        return self.run.hypernetwork.seed + self.run.train.seed

    def new_adapter(self, base: Model) -> Adapter:
        """An adapter as the hypernetwork would write it, to be trained by itself; its start depends on the seed."""
        config = self.run.hypernetwork.adapter
        return adapters.init(dataclasses.replace(config, seed=config.seed + self.run.train.seed), base)

    def loaded(self) -> Model:
        """The base with its parameters."""
        return load(self.run.model, None if self.run.dtype == "stored" else self.run.dtype, self.run.execution)

    def job(self, task: Task, initial: Params, frozen: Params | None = None) -> Job:
        """Job of a task."""
        data = DataConfig(source=self.run.tasks.directory, sequence_length=self.run.tasks.sequence_length)
        return Job(task, self.model, initial, self.run.execution, data, self.run.train, frozen=frozen or {})


@dataclass(frozen=True)
class Problem:
    """Job of a run, and the function that writes its result into the workdir and returns figures for the summary."""

    job: Job
    finish: Callable[[Params], dict[str, Any]]


@alone
def text_to_lora(run: TextToLoraConfig, workdir: Path, name: str = "") -> dict[str, Any]:
    """Train, resume, or skip a finished run; returns the content of summary.json.

    Leaves adapters/TASK for each task (oracles), adapters/multitask or hypernetwork/; and splits.json.
    """
    run, config = _resolved(run)
    mesh = sharding.make_mesh(run.mesh)
    steps.check_batch(mesh, run.train)
    check_new(run.hypernetwork.adapter, config)
    done = begin(workdir, run)
    if done is not None:
        return done
    tokenizer = load_tokenizer(run.model)
    tasks = material.read(run.tasks, tokenizer)
    setup = Setup(run, config, tasks, material.material(run, tasks, tokenizer), workdir)
    with writing(workdir):
        task_splits.write(dataclasses.replace(tasks.splits, train=tasks.train), workdir / SPLITS)
        problem = PROBLEMS[run.objective](setup)
        params, figures = fit_batches(problem.job, mesh, _feed(setup, mesh), workdir)
        summary = {
            "name": name,
            "objective": run.objective,
            "tasks": len(setup.names),
            "learning_rate": run.train.learning_rate,
            "seed": run.train.seed,
            **problem.finish(sharding.to_host(mesh, params)),
            **figures,
            **machine(),
            "data": {"source": run.tasks.directory, "fingerprint": rows.fingerprint(setup.material.training)},
        }
        disk.write_json(workdir / SUMMARY, summary)
    return summary


def _resolved(run: TextToLoraConfig) -> tuple[TextToLoraConfig, ModelConfig]:
    """The run with its `auto` keys and the base's hash, and the base's architecture."""
    config, _ = read_config(Path(run.model))
    base = manifest.input_of(Path(run.model)).sha256
    if run.base_sha256 not in (None, base):
        raise UserError(
            f"model={run.model} is another one than base_sha256 says (its hash is {base}): give the base with the hash "
            f"{run.base_sha256}"
        )
    execution = dataclasses.replace(run.execution.resolve(jax.default_backend()), expert_gradients=False)
    return dataclasses.replace(run, base_sha256=base, execution=execution), config


def _feed(setup: Setup, mesh: jax.sharding.Mesh) -> Feed:
    run, found = setup.run, setup.material
    shard, size = sharding.process_shard(mesh), run.train.batch_size
    rows_of_each = -(-run.train.evaluate_batches * size // len(found.validation))
    return Feed(
        batches=rows.training_batches(found.training, size, run.rows_per_task, run.train.seed, shard),
        validation=rows.validation_batches(found.validation, size, rows_of_each, shard),
        corpus=rows.fingerprint(found.training),
    )


def _oracles(setup: Setup) -> Problem:
    run, names = setup.run, setup.names
    if run.train.batch_size != run.rows_per_task * len(names):
        raise UserError(
            f"oracles train all {len(names)} tasks in each step: set train.batch_size={run.rows_per_task * len(names)},"
            " or lower tasks.train"
        )
    base = setup.loaded()
    new = setup.new_adapter(base)
    task, tree = objectives.oracles(base, [new] * len(names))

    def finish(params: Params) -> dict[str, Any]:
        for number, name in enumerate(names):
            _write_adapter(setup, Adapter(new.config, bank.entry(params[BANK], number)), name)
        return {"parameters": adapters.count(new) * len(names), "adapter": to_dict(new.config)}

    return Problem(setup.job(task, base.params | tree), finish)


def _multitask(setup: Setup) -> Problem:
    setup.tasks.splits.check_training(setup.names)
    base = setup.loaded()
    new = setup.new_adapter(base)
    task = objectives.multitask(base, new, setup.run)

    def finish(params: Params) -> dict[str, Any]:
        _write_adapter(setup, Adapter(new.config, params[ADAPTER]), MULTITASK)
        return {"parameters": adapters.count(new), "adapter": to_dict(new.config)}

    return Problem(setup.job(task, base.params | {ADAPTER: new.tree}), finish)


def _write_adapter(setup: Setup, adapter: Adapter, name: str) -> None:
    target = setup.workdir / ADAPTERS / name
    with outputs.directory(target, adapter_directory.KIND, overwrite=True) as unfinished:
        adapter_directory.save(adapter, setup.model, setup.base, unfinished)


def _reconstruction(setup: Setup) -> Problem:
    run = setup.run
    library = [_oracle(setup, name) for name in setup.names]
    config = dataclasses.replace(run.hypernetwork, adapter=library[0].config, seed=setup.seed)
    new = hypernetworks.init(config, Model(setup.model, {}, run.execution), setup.material.width)
    new = hypernetworks.z_scored(new, library)
    task, frozen = objectives.reconstruction(new, library, run.target)
    job = setup.job(task, {HYPERNETWORK: new.params}, frozen)
    return Problem(job, lambda params: _write(setup, new.with_params(params[HYPERNETWORK])))


def _oracle(setup: Setup, name: str) -> Adapter:
    assert setup.run.library is not None
    directory = Path(setup.run.library) / ADAPTERS / name
    if not directory.is_dir():
        raise UserError(f"library={setup.run.library} has no oracle of task {name}: train oracles of these tasks first")
    return adapter_directory.load(directory, setup.model, setup.base)


def _supervised(setup: Setup) -> Problem:
    setup.tasks.splits.check_training(setup.names)
    base = setup.loaded()
    config = dataclasses.replace(setup.run.hypernetwork, seed=setup.seed)
    new = hypernetworks.init(config, base, setup.material.width)
    task = objectives.supervised(base, new, setup.run)
    job = setup.job(task, base.params | {HYPERNETWORK: new.params}, hypernetworks.frozen(new))
    return Problem(job, lambda params: _write(setup, new.with_params(params[HYPERNETWORK])))


def _write(setup: Setup, hypernetwork: Hypernetwork) -> dict[str, Any]:
    """Write hypernetwork/; return figures for the summary."""
    trained = Trained(hypernetwork, setup.base, setup.material.encoder, setup.names)
    with outputs.directory(setup.workdir / RESULT, hypernetwork_directory.KIND, overwrite=True) as unfinished:
        hypernetwork_directory.save(trained, unfinished)
    return {
        "head": hypernetwork.config.head,
        "conditioning": setup.run.conditioning,
        "parameters": hypernetworks.count(hypernetwork),
        "adapter": to_dict(hypernetwork.config.adapter),
    }


PROBLEMS = {
    "oracles": _oracles, "multitask": _multitask, "reconstruction": _reconstruction, "supervised": _supervised
}  # fmt: skip
