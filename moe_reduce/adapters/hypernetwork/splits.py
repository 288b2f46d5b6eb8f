"""Training, validation and unseen tasks, given by lists or drawn by seed, and checked for leaks."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_reduce.adapters.hypernetwork.leaks import Leak, leaks
from moe_reduce.adapters.hypernetwork.tasks import DescribedTask
from moe_reduce.core.disk import write_json
from moe_reduce.core.errors import UserError
from moe_reduce.core.json_files import read_object


@dataclass(frozen=True)
class Splits:
    """Names of tasks. `unseen` tasks test generalisation: nothing of them may train or choose a hypernetwork."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    unseen: tuple[str, ...]

    def check_training(self, names: Iterable[str]) -> None:
        """Raise UserError for the first name that may not train."""
        for name in names:
            for split in ("validation", "unseen"):
                if name in getattr(self, split):
                    raise UserError(
                        f"task {name} is in the split {split}, so it may not train: take it from one of them"
                    )


def given(tasks: Sequence[DescribedTask], content: Mapping[str, Any]) -> Splits:
    """Splits from lists of names under `train`, `validation` and `unseen`.

    Raises UserError for an unknown name, a name in two lists, and a leak between two lists.
    """
    known, seen = {task.name for task in tasks}, {}
    for split in ("train", "validation", "unseen"):
        for name in content.get(split, ()):
            if name not in known:
                raise UserError(f"split {split} names task {name}, which is not among the tasks read: correct it")
            if name in seen:
                raise UserError(f"task {name} is in the splits {seen[name]} and {split}: take it from one of them")
            seen[name] = split
    if not content.get("train"):
        raise UserError("split train names no task: name at least one")
    splits = Splits(*(tuple(content.get(split, ())) for split in ("train", "validation", "unseen")))
    check(splits, tasks)
    return splits


def drawn(tasks: Sequence[DescribedTask], validation: int, unseen: int, seed: int = 0) -> Splits:
    """Splits drawn by seed: tasks that leak into each other stay on one side, the largest group in training.

    validation, unseen: numbers of tasks. Raises UserError if no such splits were found.
    """
    groups = _groups([task.name for task in tasks], leaks(tasks))
    random.Random(seed).shuffle(groups)
    groups.sort(key=len)  # stable: single tasks first, in random order
    chosen: dict[str, list[str]] = {"unseen": [], "validation": [], "train": []}
    wanted = {"unseen": unseen, "validation": validation}
    for group in groups:
        fits = (split for split in wanted if len(chosen[split]) + len(group) <= wanted[split])
        chosen[next(fits, "train")] += group
    for split, count in wanted.items():
        if len(chosen[split]) < count or not chosen["train"]:
            raise UserError(
                f"{len(tasks)} tasks cannot give {count} {split} tasks that share nothing with others: ask for fewer"
            )
    return Splits(*(tuple(sorted(chosen[split])) for split in ("train", "validation", "unseen")))


def check(splits: Splits, tasks: Sequence[DescribedTask]) -> None:
    """Raise UserError for the first leak between two splits."""
    side = {name: split for split, names in asdict(splits).items() for name in names}
    for leak in leaks([task for task in tasks if task.name in side]):
        if side[leak.left] != side[leak.right]:
            raise UserError(
                f"tasks {leak.left} ({side[leak.left]}) and {leak.right} ({side[leak.right]}) leak into each other: "
                f"{leak.reason}; put both into one split"
            )


def read(file: Path, tasks: Sequence[DescribedTask]) -> Splits:
    """Splits of a JSON file, as `given`."""
    return given(tasks, read_object(file))


def write(splits: Splits, file: Path) -> None:
    """Write the splits as JSON."""
    write_json(file, asdict(splits))


def _groups(names: Sequence[str], found: Sequence[Leak]) -> list[list[str]]:
    """Tasks that leak into each other, directly or through others, as lists; every other task by itself."""
    group = {name: [name] for name in names}
    for leak in found:
        left, right = group[leak.left], group[leak.right]
        if left is not right:
            left += right
            group.update(dict.fromkeys(right, left))
    return list({id(members): members for members in group.values()}.values())
