"""Described tasks, measured under conditions that are compared: prompts, and adapters of many origins.

Losses are those of the completions, nats a token. Answers are generated greedily and scored as in
Super-NaturalInstructions (arXiv:2204.07705): exact match and ROUGE-L against the best of the acceptable outputs.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from moe_reduce.adapters import bank
from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork.conditioning import Conditioning
from moe_reduce.adapters.hypernetwork.directory import Trained
from moe_reduce.adapters.hypernetwork.rows import TaskRows, encode
from moe_reduce.adapters.hypernetwork.tasks import DescribedTask, pairs
from moe_reduce.core.config import GenerateConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizers import Tokenizer
from moe_reduce.inference.evaluate import row_sums
from moe_reduce.inference.generate import ready
from moe_reduce.inference.lengths import bucket
from moe_reduce.inference.text import complete, end_ids
from moe_reduce.models.model import Model

STOPS = ("\n\n", "\nInput:")  # where an answer ends at the latest: the prompts of few-shot examples go on like this
RANDOM_LETTERS = 80  # of a description that says nothing
NO_EMBEDDING = np.zeros((1, 1), np.float32)


@dataclass(frozen=True)
class Condition:
    """One way to ask: an adapter for each task, in order (None: the base), and the form of the prompts."""

    name: str
    adapters: tuple[Adapter | None, ...]
    description: bool = False  # put the task's first description in front of each prompt
    shots: int = 0  # positive examples in front of each input


@dataclass(frozen=True)
class Settings:
    """Sizes of a measurement."""

    batch_size: int = 8
    max_tokens: int = 32  # of an answer; 0: measure losses only


def prompted(tasks: Sequence[DescribedTask], shots: int) -> list[Condition]:
    """Conditions without an adapter: the input alone, after its description, and after examples."""
    nothing = (None,) * len(tasks)
    found = [Condition("base", nothing), Condition("description in the prompt", nothing, description=True)]
    if shots and all(len(task.examples) >= shots for task in tasks):
        found.append(Condition(f"{shots} examples", nothing, shots=shots))
    return found


def written(
    name: str, trained: Trained, conditioning: Conditioning, tasks: Sequence[DescribedTask], seed: int = 0
) -> list[Condition]:
    """Conditions of a hypernetwork: with each task's own description, the next task's, and random letters."""
    first = [replace(task, descriptions=task.descriptions[:1]) for task in tasks]
    letters = random.Random(seed)

    def meaningless() -> str:
        return "".join(letters.choice(string.ascii_lowercase + " ") for _ in range(RANDOM_LETTERS))

    given = {
        "own description": first,
        "another task's description": [*first[1:], first[0]],
        "random description": [replace(task, name="", descriptions=(meaningless(),)) for task in first],
    }
    return [
        Condition(f"{name}, {kind}", tuple(_write(trained, conditioning, described)))
        for kind, described in given.items()
    ]


def _write(trained: Trained, conditioning: Conditioning, tasks: Sequence[DescribedTask]) -> list[Adapter]:
    embeddings_ZW = np.concatenate([conditioning.embeddings(task) for task in tasks])
    return hypernetworks.written(trained.hypernetwork, embeddings_ZW)


def average(library: Sequence[Adapter]) -> Adapter:
    """The adapter whose trained leaves are the means of those of a library (one configuration)."""
    import jax

    return Adapter(library[0].config, jax.tree.map(_mean, *(adapter.tree for adapter in library)))


def _mean(*leaves: Any) -> Any:
    return sum(leaves) / len(leaves) if np.issubdtype(leaves[0].dtype, np.floating) else leaves[0]


def measure(
    base: Model, tokenizer: Tokenizer, tasks: Sequence[DescribedTask], condition: Condition, settings: Settings
) -> dict[str, Any]:
    """Figures of one condition: means over tasks, and those of each task.

    {name, loss, accuracy, exact_match, rouge_l, tasks: {task: {loss, ...}}}; exact_match and rouge_l only if answers
    are generated.
    """
    model, entries = _activated(base, condition.adapters)
    figures = {task.name: {} for task in tasks}
    answers = _answers(ready(model), tokenizer, settings) if settings.max_tokens else None
    for number, task in enumerate(tasks):
        texts = pairs(task, task.descriptions[0] if condition.description else "", condition.shots)
        entry = None if entries is None else entries[number]
        figures[task.name] |= _losses(model, _rows(task, tokenizer, texts, base), entry, settings)
        if answers is not None:
            figures[task.name] |= _scores(task, answers([prompt for prompt, _ in texts], entry))
    names = next(iter(figures.values()))
    means = {name: float(np.mean([found[name] for found in figures.values()])) for name in names}
    return {"name": condition.name, **means, "tasks": figures}


def _activated(base: Model, adapters: Sequence[Adapter | None]) -> tuple[Model, list[int] | None]:
    """(the base with its distinct adapters in a bank, the entry of each task); no bank if there is no adapter."""
    distinct = list(dict.fromkeys(adapters))
    if distinct == [None]:
        return base, None
    return bank.activate(base, distinct), [distinct.index(adapter) for adapter in adapters]


def _rows(task: DescribedTask, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], base: Model) -> TaskRows:
    longest = max(len(tokenizer.encode_pair(*text)[0]) for text in texts)
    if longest > base.config.max_positions:
        raise UserError(
            f"task {task.name}: a prompt and its completion have {longest} tokens, and the model's context "
            f"{base.config.max_positions}: give fewer examples, or leave the task out"
        )
    return encode(task, tokenizer, bucket(longest), NO_EMBEDDING, texts)


def _losses(model: Model, rows: TaskRows, entry: int | None, settings: Settings) -> dict[str, float]:
    size = settings.batch_size
    found = [rows.example(index, entry or 0, 0) for index in range(len(rows.tokens_XT))]
    found += [found[0] | {"weights": np.zeros_like(found[0]["weights"])}] * (-len(found) % size)
    names = ("tokens", "targets", "weights") if entry is None else ("tokens", "targets", "weights", "adapter")
    batches = [
        {
            name: np.stack([row["task" if name == "adapter" else name] for row in found[start : start + size]])
            for name in names
        }
        for start in range(0, len(found), size)
    ]
    figures = row_sums(model, batches).figures()
    return {name: figures[name] for name in ("loss", "accuracy")}


def _answers(model: Model, tokenizer: Tokenizer, settings: Settings) -> Callable[[list[str], int | None], list[str]]:
    generation = GenerateConfig(max_tokens=settings.max_tokens, end_ids=end_ids(model, tokenizer))

    def answers(prompts: list[str], entry: int | None) -> list[str]:
        found: list[str] = []
        for start in range(0, len(prompts), settings.batch_size):
            part = prompts[start : start + settings.batch_size]
            filled = part + part[:1] * (settings.batch_size - len(part))  # one program for all batches
            entries = None if entry is None else [entry] * len(filled)
            found += complete(model, tokenizer, filled, generation, STOPS, entries)[: len(part)]
        return found

    return answers


def _scores(task: DescribedTask, answers: Sequence[str]) -> dict[str, float]:
    pairs_of_texts = list(zip(answers, (instance.outputs for instance in task.instances), strict=True))
    return {
        "exact_match": float(
            np.mean([max(exact_match(text, one) for one in outputs) for text, outputs in pairs_of_texts])
        ),
        "rouge_l": float(np.mean([max(rouge_l(text, one) for one in outputs) for text, outputs in pairs_of_texts])),
    }


def exact_match(answer: str, output: str) -> float:
    """1 if both texts are equal without case, punctuation and the amount of white space, else 0."""
    return float(_normal(answer) == _normal(output))


def _normal(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def rouge_l(answer: str, output: str) -> float:
    """F-measure of ROUGE-L with stemming, 0 to 1, by the package rouge-score."""
    return _scorer().score(output, answer)["rougeL"].fmeasure


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("answers are scored by the package rouge-score: pip install -e '.[evaluate]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)
