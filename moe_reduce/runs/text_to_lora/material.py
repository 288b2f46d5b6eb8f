"""Tasks, splits, embeddings and token rows of a run."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_reduce.adapters.hypernetwork import splits as task_splits
from moe_reduce.adapters.hypernetwork.conditioning import Conditioning
from moe_reduce.adapters.hypernetwork.encoders import open_encoder
from moe_reduce.adapters.hypernetwork.rows import TaskRows, encode
from moe_reduce.adapters.hypernetwork.splits import Splits
from moe_reduce.adapters.hypernetwork.tasks import DescribedTask, divided, read_tasks
from moe_reduce.core.config import TextToLoraConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.text_to_lora_config import TasksConfig
from moe_reduce.data.tokenizers import load_tokenizer

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


def read(config: TasksConfig) -> Tasks:
    """The tasks of a directory and their splits. Raises UserError for a leak, and for too few tasks."""
    wordings = None if config.wordings is None else Path(config.wordings)
    tasks = read_tasks(Path(config.directory), wordings=wordings, descriptions=config.descriptions)
    if config.splits is None:
        splits = task_splits.drawn(tasks, config.validation, config.unseen, config.seed)
    else:
        splits = task_splits.read(Path(config.splits), tasks)
    return Tasks({task.name: task for task in tasks}, splits, _used(splits, config))


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


def material(run: TextToLoraConfig, tasks: Tasks) -> Material:
    """Rows of a run. Prints how many instances were too long.

    Oracles validate on held-out instances of their own tasks, a hypernetwork on the validation tasks, and if there are
    none, or it reconstructs, on held-out instances of its training tasks.
    """
    tokenizer = load_tokenizer(run.model)
    length = run.tasks.sequence_length
    described = None if run.objective == "oracles" else conditioning(run, tasks)

    def rows(chosen: list[DescribedTask], held_out: bool) -> list[TaskRows]:
        parts = [divided(task, run.tasks.held_out, run.tasks.seed)[held_out] for task in chosen]
        return [
            encode(part, tokenizer, length, NOTHING if described is None else described.embeddings(part))
            for part in parts
        ]

    trained = tasks.named(run.split)
    others = tasks.named("validation") if run.objective == "supervised" else []
    training = rows(trained, False)
    left_out = sum(task.left_out for task in training)
    if left_out:
        print(f"{left_out:,} instances are longer than tasks.sequence_length={length} and were left out", flush=True)
    return Material(training, rows(others or trained, True), {} if described is None else described.entry())
