"""Measures how two wordings of a task change the answers -> docs/results/text_to_lora/steering.json.

For each unseen task, its first description is extended by one of two wordings that ask for opposite forms of the
answer. A hypernetwork writes an adapter for each, and the same inputs are answered with both. Followed: the share of
inputs on which the answers differ in the direction that the wordings ask for. Opposed: the share on which they differ
in the other. The same wordings are also put into the prompt of the base, without an adapter.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import moe_reduce
from moe_reduce.adapters import bank
from moe_reduce.adapters.hypernetwork import conditioning, directory
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork.conditioning import Conditioning
from moe_reduce.adapters.hypernetwork.directory import Trained
from moe_reduce.adapters.hypernetwork.tasks import DescribedTask, pairs
from moe_reduce.core import disk
from moe_reduce.core.config import GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import Tokenizer, load_tokenizer
from moe_reduce.inference.described_tasks import STOPS
from moe_reduce.inference.generate import ready
from moe_reduce.inference.text import complete, end_ids
from moe_reduce.models.model import Model
from moe_reduce.runs.text_to_lora import material
from moe_reduce.storage import manifest

OUT = Path("docs/results/text_to_lora/steering.json")
MAX_TOKENS = 24
EXAMPLES = 4  # shown in the result, of each pair of wordings


class Wordings(NamedTuple):
    """Two endings of a description, and the number that should be larger in answers to the second."""

    name: str
    first: str
    second: str
    measure: Callable[[str], float]


def is_question(answer: str) -> float:
    """1 for an answer with a question mark, else 0."""
    return float("?" in answer)


PAIRS = (
    Wordings("length", "Answer with a single word.", "Answer with a complete sentence.", lambda a: len(a.split())),
    Wordings("question", "Your output should be a statement.", "Your output should be a question.", is_question),
    Wordings("yes or no", "Answer in your own words.", "Answer with yes or no.",
             lambda a: float(a.strip().lower().startswith(("yes", "no")))),
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Returns 2 after a line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=Path("runs/smollm2"), type=Path)
    parser.add_argument("--run", required=True, type=Path, help="workdir of a supervised text-to-lora run")
    parser.add_argument("--out", default=OUT, type=Path, help="JSON file of the result (default: %(default)s)")
    parser.add_argument("--inputs", type=int, default=8, help="inputs of each task (default: %(default)s)")
    try:
        measured(parser.parse_args(words))
    except UserError as error:
        print(f"text_to_lora_steering.py: {error}", file=sys.stderr)
        return error.status
    return 0


def measured(arguments: argparse.Namespace) -> None:
    """Writes the result after each pair of wordings, and prints its rates."""
    asked = Asked.of(arguments)
    rates = []
    for wordings in PAIRS:
        for by, answers in (("hypernetwork", asked.adapted), ("description in the prompt", asked.prompted)):
            rates.append(result(wordings, by, [row for task in asked.tasks for row in rows(answers, task, wordings)]))
            shown = (f"{name} {rates[-1][name]:.1%}" for name in ("followed", "opposed", "same_answer"))
            print(f"{wordings.name}, {by}: {', '.join(shown)}", flush=True)
        disk.write_json(arguments.out, {"run": str(arguments.run), "tasks": len(asked.tasks), "rates": rates})
    print(arguments.out)


@dataclass(frozen=True)
class Asked:
    """The unseen tasks of a run, and the models that answer their inputs."""

    tasks: list[DescribedTask]
    base: Model
    ready: Model
    tokenizer: Tokenizer
    trained: Trained
    encoding: Conditioning
    settings: GenerateConfig

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Asked":
        """Loads what the arguments name; raises UserError for a task that trained the hypernetwork."""
        tokenizer, base = load_tokenizer(arguments.model), moe_reduce.load(arguments.model)
        config = material.tasks_of_run(arguments.run)
        tasks = material.read(config, tokenizer).named("unseen")
        trained = directory.load(arguments.run / "hypernetwork", manifest.input_of(arguments.model))
        trained.check_unseen(tuple(task.name for task in tasks))
        tasks = [replace(task, instances=task.instances[: arguments.inputs]) for task in tasks]
        settings = GenerateConfig(max_tokens=MAX_TOKENS, end_ids=end_ids(base, tokenizer))
        encoding = conditioning.of_trained(trained, Path(config.cache))
        return cls(tasks, base, ready(base), tokenizer, trained, encoding, settings)

    def adapted(self, both: Sequence[DescribedTask]) -> list[list[str]]:
        """Answers of the adapters that are written for each wording's description, to the inputs alone."""
        embeddings_ZW = np.concatenate([self.encoding.embeddings(task) for task in both])
        adapters = hypernetworks.written(self.trained.hypernetwork, embeddings_ZW)
        model = ready(bank.activate(self.base, adapters))
        return [
            complete(model, self.tokenizer, inputs(task), self.settings, STOPS, [entry] * len(task.instances))
            for entry, task in enumerate(both)
        ]

    def prompted(self, both: Sequence[DescribedTask]) -> list[list[str]]:
        """Answers of the base to the inputs after each wording's description."""
        return [
            complete(self.ready, self.tokenizer, inputs(task, task.descriptions[0]), self.settings, STOPS)
            for task in both
        ]


def inputs(task: DescribedTask, description: str = "") -> list[str]:
    """Prompts of a task's instances."""
    return [prompt for prompt, _ in pairs(task, description)]


def rows(
    answers: Callable[[Sequence[DescribedTask]], list[list[str]]], task: DescribedTask, wordings: Wordings
) -> Iterator[dict[str, str]]:
    """Answers to both wordings for each input of a task."""
    endings = (wordings.first, wordings.second)
    both = [replace(task, name="", descriptions=(f"{task.descriptions[0]} {ending}",)) for ending in endings]
    for prompt, one, other in zip(inputs(task), *answers(both), strict=True):
        yield {"task": task.name, "prompt": prompt, "first": one.strip(), "second": other.strip()}


def result(wordings: Wordings, by: str, answers: list[dict[str, str]]) -> dict[str, Any]:
    """Rates of one pair of wordings, with examples of answers that differ."""
    change = np.array([wordings.measure(row["second"]) - wordings.measure(row["first"]) for row in answers])
    differing = [row for row in answers if row["first"] != row["second"]]
    return {
        "wordings": wordings.name,
        "first": wordings.first,
        "second": wordings.second,
        "by": by,
        "inputs": len(answers),
        "followed": float(np.mean(change > 0)),
        "opposed": float(np.mean(change < 0)),
        "same_answer": 1 - len(differing) / len(answers),
        "examples": differing[:: max(1, len(differing) // EXAMPLES)][:EXAMPLES],
    }


if __name__ == "__main__":
    sys.exit(main())
