"""Tasks in the format of Super-NaturalInstructions (arXiv:2204.07705), as prompts and completions.

A directory holds one file a task, taskNAME.json or taskNAME.json.gz. More wordings of a description may stand beside
it, in taskNAME.descriptions.yaml (as Text-to-LoRA publishes them) or .json, compressed or not, or all together in one
JSON file {name: [wording, ...]}.
"""

import gzip
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError

MOST_DESCRIPTIONS = 128  # of one task (arXiv:2506.06105)
PROMPT = "Input: {}\nOutput:"  # of an instance, without the description, which the adapter has read
SUFFIXES = (".json", ".json.gz")
WORDINGS = (".descriptions.json", ".descriptions.json.gz", ".descriptions.yaml", ".descriptions.yaml.gz")
UNREADABLE = (OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Instance:
    """An input and its acceptable outputs, the best first."""

    text: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class DescribedTask:
    """One task: descriptions in some wordings, positive examples, and instances."""

    name: str
    descriptions: tuple[str, ...]
    examples: tuple[Instance, ...]
    instances: tuple[Instance, ...]
    categories: tuple[str, ...]
    sources: tuple[str, ...]  # data sets that the instances come from


def read_tasks(
    directory: Path, names: Sequence[str] = (), wordings: Path | None = None, descriptions: int = MOST_DESCRIPTIONS
) -> list[DescribedTask]:
    """Tasks of a directory, by name; all, or those named.

    wordings: JSON file with more descriptions of tasks. descriptions: most descriptions of a task; the definition is
    the first. Raises UserError for a directory without tasks, an unknown name and a damaged file.
    """
    files = {_name(file): file for file in sorted(directory.glob("task*.json*")) if _is_task(file)}
    if not files:
        raise UserError(f"{directory} holds no task (task*.json or task*.json.gz): give a directory of tasks")
    for name in names:
        if name not in files:
            raise UserError(f"{directory} holds no task {name}: it is neither {name}.json nor {name}.json.gz")
    more = {} if wordings is None else _object(wordings)
    chosen = names or list(files)
    return [_with_wordings(read_task(files[name]), files[name], more, descriptions) for name in chosen]


def read_task(file: Path) -> DescribedTask:
    """The task of one file. Raises UserError for a file that is no task, or has no instances or definition."""
    raw = _object(file)
    try:
        task = DescribedTask(
            name=_name(file),
            descriptions=tuple(text.strip() for text in _texts(raw["Definition"]) if text.strip()),
            examples=tuple(_instance(entry) for entry in raw.get("Positive Examples", ())),
            instances=tuple(_instance(entry) for entry in raw["Instances"]),
            categories=_texts(raw.get("Categories", ())),
            sources=_texts(raw.get("Source", ())),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no task of Super-NaturalInstructions ({error!r}): it needs Definition and Instances"
        ) from None
    if not task.instances:
        raise UserError(f"{file} has no instances: remove the task, or add its instances")
    if not task.descriptions:
        raise UserError(f"{file} has an empty Definition: say in a sentence what the task is")
    return task


def divided(task: DescribedTask, held_out: int, seed: int = 0) -> tuple[DescribedTask, DescribedTask]:
    """(the task with its training instances, the task with `held_out` others), chosen by seed.

    An input that stands on both sides goes to the held-out side. Raises UserError if no training instance is left.
    """
    order = list(task.instances)
    random.Random(f"{seed} {task.name}").shuffle(order)
    held = order[:held_out]
    seen = {instance.text for instance in held}
    training = [instance for instance in order[held_out:] if instance.text not in seen]
    if not training:
        raise UserError(f"task {task.name} has {len(order)} instances, too few to hold {held_out} out: hold out fewer")
    return replace(task, instances=tuple(training)), replace(task, instances=tuple(held))


def sampled(task: DescribedTask, count: int | None, seed: int = 0) -> DescribedTask:
    """The task with at most `count` of its instances, chosen by seed; None: all."""
    if count is None or len(task.instances) <= count:
        return task
    return replace(task, instances=tuple(random.Random(f"{seed} {task.name} sample").sample(task.instances, count)))


def pairs(task: DescribedTask, description: str = "", examples: int = 0) -> list[tuple[str, str]]:
    """(prompt, completion) of every instance; the completion is its best output.

    description: put in front of each prompt. examples: number of positive examples in front of the input, as in
    few-shot prompting. Raises UserError if the task has fewer examples.
    """
    if examples > len(task.examples):
        raise UserError(f"task {task.name} has {len(task.examples)} positive examples, not {examples}: ask for fewer")
    shots = [f"{PROMPT.format(example.text)} {example.outputs[0]}" for example in task.examples[:examples]]
    before = "".join(f"{part}\n\n" for part in (*([description] if description else []), *shots))
    return [(before + PROMPT.format(instance.text), f" {instance.outputs[0]}") for instance in task.instances]


def _with_wordings(task: DescribedTask, file: Path, more: Mapping[str, Any], limit: int) -> DescribedTask:
    beside = next((found for suffix in WORDINGS if (found := file.with_name(task.name + suffix)).is_file()), None)
    wordings = list(task.descriptions)
    if beside is not None:
        wordings += _texts(_object(beside).get("descriptions", ()))
    wordings += _texts(more.get(task.name, ()))
    unique = dict.fromkeys(text.strip() for text in wordings)
    return replace(task, descriptions=tuple(text for text in unique if text)[:limit])


def _is_task(file: Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.name.endswith(WORDINGS)


def _name(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".json")


def _object(file: Path) -> dict[str, Any]:
    try:
        data = gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes()
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read ({str(error) or type(error).__name__}): fetch it again") from None
    content = _yaml(data, file) if ".yaml" in file.name else json_files.parse(data, file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {type(content).__name__}, not an object: fetch it again")
    return content


def _yaml(data: bytes, file: Path) -> Any:
    import yaml  # only for wordings in this format

    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML ({error}): fetch it again") from None


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{texts!r} is no text")
    return texts


def _instance(entry: Mapping[str, Any]) -> Instance:
    outputs = _texts(entry["output"])
    if not outputs:
        raise TypeError("an instance has no output")
    return Instance(str(entry["input"]), outputs)
