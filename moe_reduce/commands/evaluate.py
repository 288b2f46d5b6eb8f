"""moe-reduce evaluate: measure a model, beside a baseline if given, on a corpus or on tasks of lm-eval."""

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import adapter_arguments, model_arguments
from moe_reduce.core import disk, outputs
from moe_reduce.core.data_config import content
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_reduce.inference.tasks import Results
    from moe_reduce.models.model import Model

CORPUS_ONLY = ("tokenizer", "sequence_length", "max_batches", "cache")
SUMMARY = "summary.json"
QUESTIONS = "questions.json"  # values of each question of --tasks
KIND = outputs.json_kind("an evaluation", SUMMARY, ("model", "baseline", "compute_dtype"), (QUESTIONS,))
TASKS_ONLY = ("task_path", "task_data", "few_shot", "limit", "allow_code")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    adapter_arguments.add_adapter(parser)
    parser.add_argument("--baseline", type=Path, help="another model: report how much of its quality --model keeps")
    model_arguments.add_data(parser, required=False, purpose="text to measure on, all of it")
    parser.set_defaults(**dict.fromkeys(model_arguments.CORPUS_DEFAULTS))  # so that given arguments are known
    parser.add_argument("--tasks", help="tasks of lm-eval instead of --data, comma separated, such as arc_easy,gsm8k")
    parser.add_argument("--task-path", type=Path, help="directory with tasks of your own (YAML files of lm-eval)")
    parser.add_argument("--task-data", type=Path, help="directory that tasks of --task-path read (metadata `data`)")
    parser.add_argument("--few-shot", type=int, help="examples before each question (default: the task's own number)")
    parser.add_argument("--limit", type=int, help="most questions of each task (default: all)")
    shown = "execute the programs that the model writes, for tasks such as humaneval"
    parser.add_argument("--allow-code", action="store_true", default=None, help=shown)
    model_arguments.add_tensor(parser)
    model_arguments.add_out(parser, "runs/evaluation")


def run(arguments: argparse.Namespace, overrides: list[str]) -> Path:
    """Prints the metrics, writes summary.json and returns its path."""
    model_arguments.no_overrides(overrides)
    if bool(arguments.data) == bool(arguments.tasks):
        raise UserError("give either --data=CORPUS or --tasks=NAMES")
    if arguments.tasks:
        model_arguments.check_unused(arguments, "with --tasks", *CORPUS_ONLY)
    else:
        model_arguments.check_unused(arguments, "without --tasks", *TASKS_ONLY)
        model_arguments.fill(arguments, model_arguments.CORPUS_DEFAULTS)
    model_arguments.check_positive(arguments, "limit", "batch_size")
    adapter_arguments.check_adapters(filter(None, [arguments.adapter]))
    model_arguments.check_out(arguments, KIND)
    mesh = model_arguments.tensor_mesh(arguments, *filter(None, (arguments.model, arguments.baseline)))
    result, answered = _on_tasks(arguments, mesh) if arguments.tasks else (_on_corpus(arguments, mesh), None)
    print(model_arguments.show(result, as_json=False))
    if arguments.data:
        print(_measured_text(arguments, result["tokens"]))
    with outputs.directory(arguments.out, KIND, arguments.overwrite) as unfinished:
        disk.write_json(unfinished / SUMMARY, _asked(arguments) | result)
        if answered is not None:
            _write_questions(answered, unfinished / QUESTIONS)
    return arguments.out / SUMMARY


def _measured_text(arguments: argparse.Namespace, tokens: int) -> str:
    """Names in one line the text that was measured, and says why the validation loss of a run differs."""
    if content(arguments.data) == "token_ids":
        return f"measured on: all {tokens:,} targets of {arguments.data}"
    length = model_arguments.sequence_length(arguments)
    part = "all of" if arguments.max_batches is None else f"the first {arguments.max_batches} batches of"
    return (
        f"measured on: {part} {arguments.data}, {tokens:,} tokens in sequences of {length} (the "
        "validation loss of a run is measured on the held-out part of its text only, and so differs)"
    )


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the metrics depend on."""
    of_tasks = ("tasks", *TASKS_ONLY, "batch_size", "compute_dtype")
    settings = {name: getattr(arguments, name) for name in of_tasks}
    if not arguments.tasks:
        settings = model_arguments.measured_on(arguments)
    asked = {"model": arguments.model, "adapter": arguments.adapter, "baseline": arguments.baseline} | settings
    return {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}


def _on_corpus(arguments: argparse.Namespace, mesh: "Mesh | None") -> dict[str, Any]:
    from moe_reduce.inference.evaluate import evaluate
    from moe_reduce.inference.retained import lost, retained

    data = model_arguments.data_config(arguments)
    for directory in filter(None, (arguments.model, arguments.baseline)):
        model_arguments.directory_config(directory)
    _check_tokenizers(arguments)

    def rows(directory: Path, adapter: str | None = None) -> Any:
        model = _load(arguments, directory, adapter, mesh)
        return evaluate(model, data, arguments.batch_size, arguments.max_batches, mesh)

    ours = rows(arguments.model, arguments.adapter)
    if arguments.baseline is None:
        return ours.figures()
    theirs = rows(arguments.baseline)
    compared = {
        "accuracy": retained(ours.correct, theirs.correct, ours.weight),
        "loss": lost(ours.nll, theirs.nll, ours.weight),
    }
    return ours.figures() | {"beside_baseline": compared}


def _load(arguments: argparse.Namespace, directory: Path, adapter: str | None, mesh: "Mesh | None") -> "Model":
    model = model_arguments.load_model(arguments, directory, mesh)
    return adapter_arguments.with_adapter(model, adapter, directory, arguments.tensor)


def _check_tokenizers(arguments: argparse.Namespace) -> None:
    """Raises UserError if the baseline has another tokenizer, because both models get the same token ids."""
    if arguments.baseline is None or arguments.tokenizer is not None or content(arguments.data) == "token_ids":
        return
    from moe_reduce.data.tokenizers import load_tokenizer

    if load_tokenizer(arguments.model).hash != load_tokenizer(arguments.baseline).hash:
        raise UserError(
            f"--baseline={arguments.baseline} has another tokenizer than --model, and losses compare on the same "
            "tokens only: give one that both models read, --tokenizer=PATH"
        )


def _on_tasks(arguments: argparse.Namespace, mesh: "Mesh | None") -> tuple[dict[str, Any], "Results"]:
    """Returns the result, and the values of each question of --model."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs the EleutherAI harness: pip install -e '.[evaluate]'")
    from moe_reduce.inference import tasks

    names = tuple(arguments.tasks.split(","))
    selection = tasks.Selection(
        names, arguments.task_path, arguments.task_data, arguments.few_shot, arguments.limit, bool(arguments.allow_code)
    )

    def found(directory: Path, adapter: str | None = None) -> Any:
        model = _load(arguments, directory, adapter, mesh)
        return tasks.evaluate(model, directory, selection, arguments.batch_size, mesh)

    ours = found(arguments.model, arguments.adapter)
    result = {"tasks": tasks.figures(ours), "intervals": tasks.intervals(ours)}
    if arguments.baseline is not None:
        result["beside_baseline"] = tasks.compare(ours, found(arguments.baseline))
    return result, ours


def _write_questions(answered: "Results", file: Path) -> None:
    from moe_reduce.inference import task_files

    task_files.write(answered, file)
