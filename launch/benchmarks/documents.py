"""Questions of the benchmarks: read from a directory of copies, or from the hub where none is given.

A copy is a JSON list (.json) or one JSON object a line (.jsonl), as it is or compressed (.gz). ARC, BoolQ and SVAMP are
in the instruction format of LLM-Adapters (arXiv:2304.01933); the other files are their authors' own.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset

Row = dict[str, Any]
ARC = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n(Answer1: .*)\n\nAnswer format: .*", re.DOTALL
)
BOOLQ = re.compile(
    r"Please answer the following question with true or false, question: (.*)\?\n\nAnswer format: .*", re.DOTALL
)
CHOICE = re.compile(r"(?:^| )Answer\d: ")
MBPP_EXAMPLES, MBPP_TEST = (2, 3, 4), range(11, 511)  # numbers of tasks


def arc_easy(data: str | None = None, **_: Any) -> DatasetDict:
    """ARC-Easy, with the columns of the hub's data set. data: directory of the copies."""
    return _arc(data, "ARC-Easy")


def arc_challenge(data: str | None = None, **_: Any) -> DatasetDict:
    """ARC-Challenge, with the columns of the hub's data set. data: directory of the copies."""
    return _arc(data, "ARC-Challenge")


def _arc(data: str | None, name: str) -> DatasetDict:
    if data is None:
        return load_dataset("allenai/ai2_arc", name)
    return _splits({split: map(_arc_row, _rows(data, f"{name}/{split}.json")) for split in ("train", "test")})


def _arc_row(row: Row) -> Row:
    question, choices = _matched(ARC, row).groups()
    texts = CHOICE.split(choices)[1:]
    labels = [f"answer{number}" for number in range(1, len(texts) + 1)]
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": row["answer"]}


def boolq(data: str | None = None, **_: Any) -> DatasetDict:
    """BoolQ as columns question (without its mark) and label (0: no, 1: yes). data: directory of the copies."""
    if data is None:
        return load_dataset("aps/super_glue", "boolq")
    files = {"train": "boolq/train.json", "validation": "boolq/test.json"}
    return _splits({split: map(_boolq_row, _rows(data, file)) for split, file in files.items()})


def _boolq_row(row: Row) -> Row:
    return {"question": _matched(BOOLQ, row)[1], "label": ("false", "true").index(row["answer"])}


def lambada(data: str | None = None, **_: Any) -> DatasetDict:
    """LAMBADA's test passages, as processed by OpenAI. data: directory of the copies."""
    if data is None:
        return load_dataset("EleutherAI/lambada_openai", "default")
    return _splits({"test": _rows(data, "lambada/lambada_test.jsonl")})


def gsm8k(data: str | None = None, **_: Any) -> DatasetDict:
    """GSM8K as columns question and answer. data: directory of the copies."""
    if data is None:
        return load_dataset("openai/gsm8k", "main")
    return _splits({split: _rows(data, f"gsm8k/{split}.jsonl") for split in ("train", "test")})


def svamp(data: str | None = None, **_: Any) -> DatasetDict:
    """SVAMP's 1,000 questions in the columns of GSM8K, whose training questions are the examples."""
    if data is None:
        rows = concatenate_datasets(list(load_dataset("ChilleD/SVAMP").values()))
        asked = [(f"{row['Body'].strip()} {row['Question'].strip()}", row["Answer"]) for row in rows]
    else:
        asked = [(row["instruction"], row["answer"]) for row in _rows(data, "SVAMP/test.json")]
    test = [{"question": question, "answer": f"#### {float(answer):g}"} for question, answer in asked]
    return DatasetDict({"train": gsm8k(data)["train"], "test": Dataset.from_list(test)})


def humaneval(data: str | None = None, **_: Any) -> DatasetDict:
    """HumanEval. data: directory of the copies."""
    if data is None:
        return load_dataset("openai/openai_humaneval")
    return _splits({"test": _rows(data, "humaneval/HumanEval.jsonl")})


def mbpp(data: str | None = None, **_: Any) -> DatasetDict:
    """MBPP's 500 test questions, and its three examples in the split `prompt`. data: directory of the copies."""
    if data is None:
        found = load_dataset("google-research-datasets/mbpp", "full")
        examples, test = list(found["prompt"]), found["test"]
    else:
        rows = _rows(data, "mbpp/mbpp.jsonl")
        examples, test = rows, Dataset.from_list([row for row in rows if row["task_id"] in MBPP_TEST])
    chosen = [row | {"is_fewshot": True} for row in examples if row["task_id"] in MBPP_EXAMPLES]
    return DatasetDict({"prompt": Dataset.from_list(chosen), "test": test})


def _rows(data: str, name: str) -> list[Row]:
    """The rows of a copy. FileNotFoundError if the directory has neither the file nor the compressed one."""
    file = Path(data) / name
    compressed = file.with_name(f"{file.name}.gz")
    text = gzip.decompress(compressed.read_bytes()) if compressed.is_file() else file.read_bytes()
    try:
        return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except ValueError as error:
        raise OSError(f"{file} is damaged: {error}") from error


def _splits(rows: dict[str, Any]) -> DatasetDict:
    return DatasetDict({split: Dataset.from_list(list(found)) for split, found in rows.items()})


def _matched(pattern: re.Pattern[str], row: Row) -> re.Match[str]:
    found = pattern.fullmatch(row["instruction"])
    if found is None:
        raise OSError(f"not an instruction of LLM-Adapters: {row['instruction'][:80]!r}")
    return found
