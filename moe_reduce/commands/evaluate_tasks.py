"""moe-reduce evaluate-tasks: compare prompts, adapters and hypernetworks on described tasks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import hypernetwork_arguments, model_arguments
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.adapters.adapter import Adapter
    from moe_reduce.adapters.hypernetwork.tasks import DescribedTask
    from moe_reduce.inference.described_tasks import Condition
    from moe_reduce.models.model import Model

SPLITS = ("train", "validation", "unseen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--model", required=True, type=Path, help="the base: a model directory or a .gguf file")
    parser.add_argument(
        "--run", required=True, type=Path, help="workdir of a text-to-lora run, which names the tasks and their splits"
    )
    parser.add_argument("--split", choices=SPLITS, default="unseen", help="tasks to measure (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="JSON file of the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    named = "may be repeated; NAME=DIR names its row"
    parser.add_argument(
        "--hypernetwork", action="append", default=[], help=f"a hypernetwork directory written by text-to-lora; {named}"
    )
    parser.add_argument("--adapter", action="append", default=[], help=f"one adapter for all tasks; {named}")
    parser.add_argument(
        "--oracles", type=Path, help="workdir of a text-to-lora run that trained an adapter for each of these tasks"
    )
    parser.add_argument("--average", type=Path, help="workdir of an oracles run, whose adapters are averaged")
    parser.add_argument("--examples", type=int, default=3, help="examples of few-shot prompts (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=32, help="of an answer; 0: losses only (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="instances at a time (default: %(default)s)")
    parser.add_argument(
        "--adapter-cache",
        type=Path,
        default=hypernetwork_arguments.CACHE,
        help="directory in which embeddings are kept (default: %(default)s)",
    )
    model_arguments.add_compute_dtype(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Runs the command; returns a table of the conditions. After each condition --out holds all finished ones."""
    model_arguments.no_overrides(overrides)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be positive, got {arguments.batch_size}")
    from moe_reduce.core import disk, outputs
    from moe_reduce.data.tokenizers import load_tokenizer
    from moe_reduce.inference.described_tasks import Settings, measure
    from moe_reduce.reports import tables, text_to_lora_table

    kind = outputs.json_kind("figures of tasks", arguments.out.name, ("split", "conditions"))
    outputs.check_files([arguments.out], kind, arguments.overwrite, (arguments.model, arguments.run))
    tokenizer = load_tokenizer(arguments.model)
    tasks = _tasks(arguments, tokenizer)
    base = model_arguments.load_model(arguments)
    settings = Settings(arguments.batch_size, arguments.max_tokens)
    found: list[dict[str, Any]] = []
    for condition in _conditions(arguments, base, tasks):
        found.append(measure(base, tokenizer, tasks, condition, settings))
        print(f"{condition.name}: loss {found[-1]['loss']:.4f}", flush=True)
        content = {"model": str(arguments.model), "split": arguments.split, "tasks": len(tasks), "conditions": found}
        disk.write_json(arguments.out, content)
    return tables.aligned(text_to_lora_table.of_conditions(found))


def _tasks(arguments: argparse.Namespace, tokenizer: Any) -> list["DescribedTask"]:
    """Held-out instances of the tasks of a split, as the run divided them."""
    from moe_reduce.adapters.hypernetwork.tasks import divided
    from moe_reduce.runs.text_to_lora import material

    config = material.tasks_of_run(arguments.run)
    chosen = material.read(config, tokenizer).named(arguments.split)
    if not chosen:
        raise UserError(f"the run has no tasks in the split {arguments.split}: choose another --split")
    return [divided(task, config.held_out, config.seed)[1] for task in chosen]


def _conditions(arguments: argparse.Namespace, base: "Model", tasks: list["DescribedTask"]) -> list["Condition"]:
    from moe_reduce.adapters.hypernetwork import conditioning, directory
    from moe_reduce.inference import described_tasks
    from moe_reduce.inference.described_tasks import Condition
    from moe_reduce.storage import manifest

    found = described_tasks.prompted(tasks, arguments.examples)
    if arguments.average is not None:
        names = sorted(path.name for path in (arguments.average / "adapters").glob("*"))
        mean = described_tasks.average(_library(arguments.average, names, base))
        found.append(Condition("average of oracles", (mean,) * len(tasks)))
    for name, place in map(_named, arguments.adapter):
        (adapter,) = _library(Path(place), ["."], base, "")
        found.append(Condition(name, (adapter,) * len(tasks)))
    for name, place in map(_named, arguments.hypernetwork):
        trained = directory.load(Path(place), manifest.input_of(arguments.model))
        if arguments.split != "train":
            trained.check_unseen(tuple(task.name for task in tasks))
        encoding = conditioning.of_trained(trained, arguments.adapter_cache)
        found += described_tasks.written(name, trained, encoding, tasks)
    if arguments.oracles is not None:
        library = _library(arguments.oracles, [task.name for task in tasks], base)
        found.append(Condition("oracles", tuple(library)))
    return found


def _named(value: str) -> tuple[str, str]:
    """(name, directory) of NAME=DIR or DIR."""
    name, separator, place = value.partition("=")
    return (name, place) if separator else (value, value)


def _library(workdir: Path, names: list[str], base: "Model", below: str = "adapters") -> list["Adapter"]:
    from moe_reduce.adapters import adapter_directory
    from moe_reduce.storage import manifest

    assert base.source is not None
    found = []
    for name in names:
        place = workdir / below / name
        if not place.is_dir():
            raise UserError(f"{place} is not a directory: give the workdir of an oracles run on these tasks")
        found.append(adapter_directory.load(place, base.config, manifest.input_of(base.source)))
    if not found:
        raise UserError(f"{workdir} holds no adapters: give the workdir of an oracles run")
    return found
