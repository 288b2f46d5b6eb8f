"""Tasks, splits, embeddings and token rows of a run."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_reduce.adapters.hypernetwork import splits as task_splits
from moe_reduce.adapters.hypernetwork.conditioning import Conditioning
from moe_reduce.adapters.hypernetwork.encoders import open_encoder
from moe_reduce.adapters.hypernetwork.rows import TaskRows, encode, short
from moe_reduce.adapters.hypernetwork.splits import Splits
from moe_reduce.adapters.hypernetwork.tasks import DescribedTask, divided, read_tasks, sampled
from moe_reduce.core.config import TextToLoraConfig, text_to_lora_from_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.text_to_lora_config import TasksConfig
from moe_reduce.data.tokenizers import Tokenizer
from moe_reduce.runs.workdir import read_run_config

NOTHING = np.zeros((1, 1), np.float32)  # embedding of tasks whose run reads none


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks by name, the splits, and the training tasks that are used."""

    by_name: dict[str, DescribedTask]
    splits: Splits
    train: tuple[str, ...]

    def named(self, split: str) -> list[DescribedTask]:
        """Tasks of a split; of `train` those that are used."""
        names = self.train if split == "train" else getattr(self.splits, split)
        return [self.by_name[name] for name in names]


@dataclass(frozen=True, eq=False)
class Material:
    """Rows that train and rows that validate, and the entry of the conditioning in a hypernetwork's config.json."""

    training: list[TaskRows]
    validation: list[TaskRows]
    encoder: dict[str, object]

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.training[0].embeddings_KW.shape[1]


def read(config: TasksConfig, tokenizer: Tokenizer) -> Tasks:
    """The tasks of a directory, with their short instances, and their splits.

    Prints how many tasks have too few short instances and are left out. Raises UserError for a leak between splits, and
    for too few tasks.
    """
    wordings = None if config.wordings is None else Path(config.wordings)
    every = read_tasks(Path(config.directory), wordings=wordings, descriptions=config.descriptions)
    some = [short(sampled(task, config.instances, config.seed), tokenizer, config.sequence_length) for task in every]
    tasks = [task for task in some if len(task.instances) > config.held_out]
    if not tasks:
        raise UserError(
            f"no task has more than tasks.held_out={config.held_out} instances of at most tasks.sequence_length="
            f"{config.sequence_length} tokens: raise the length, or hold out fewer"
        )
    if len(tasks) < len(every):
        print(f"{len(every) - len(tasks)} of {len(every)} tasks have too few short instances and are left out")
    if config.splits is None:
        splits = task_splits.drawn(tasks, config.validation, config.unseen, config.seed)
    else:
        splits = task_splits.read(Path(config.splits), tasks)
    return Tasks({task.name: task for task in tasks}, splits, _used(splits, config))


def tasks_of_run(workdir: Path) -> TasksConfig:
    """The tasks that a run was configured with; UserError for a directory that is no workdir of such a run."""
    try:
        return text_to_lora_from_dict(read_run_config(workdir / "config.json", TextToLoraConfig)).tasks
    except (OSError, ValueError) as error:
        raise UserError(f"--run={workdir} is no workdir of text-to-lora ({error}): give one") from None


def _used(splits: Splits, config: TasksConfig) -> tuple[str, ...]:
    """The training tasks that are used: of two runs with the same seed, the larger has all tasks of the smaller."""
    if config.train is not None and config.train > len(splits.train):
        raise UserError(f"tasks.train={config.train}, and there are {len(splits.train)} training tasks: lower it")
    order = list(splits.train)
    random.Random(config.seed).shuffle(order)
    return tuple(order[: config.train])


def conditioning(run: TextToLoraConfig, tasks: Tasks) -> Conditioning:
    """The conditioning of a run; opens its text encoder if it needs one."""
    needed = run.conditioning != "one_hot"
    encoder = open_encoder(run.hypernetwork.encoder, Path(run.tasks.cache)) if needed else None
    return Conditioning(encoder, tasks.train if run.conditioning != "text" else ())


def material(run: TextToLoraConfig, tasks: Tasks, tokenizer: Tokenizer) -> Material:
    """Rows of a run.

    What learns from completions of many tasks validates on the validation tasks, if there are any; oracles and
    reconstructions, on held-out instances of their own tasks.
    """
    generalises = run.objective in ("supervised", "multitask")
    described = conditioning(run, tasks) if run.objective in ("supervised", "reconstruction") else None

    def rows(chosen: list[DescribedTask], held_out: bool) -> list[TaskRows]:
        parts = [divided(task, run.tasks.held_out, run.tasks.seed)[held_out] for task in chosen]
        embeddings = [NOTHING if described is None else described.embeddings(part) for part in parts]
        return [
            encode(part, tokenizer, run.tasks.sequence_length, embedding)
            for part, embedding in zip(parts, embeddings, strict=True)
        ]

    trained = tasks.named(run.split)
    others = tasks.named("validation") if generalises else []
    return Material(rows(trained, False), rows(others or trained, True), {} if described is None else described.entry())
