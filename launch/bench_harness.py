"""CPU seconds of lm-eval on six tasks: through this package, and with lm-eval's own `hf` model on the same weights.

Each side runs in a process of its own, in turn, with everything that a user pays for: imports, loading, compiling from
a warm compilation cache, and the requests. A first run of ours, which fills the cache, is reported apart. The tasks are
made of Python's standard library: answers of one token, of a few words and of a sentence, a last word, whole texts,
and generation. Both sides must find the same figures.

Command: python launch/bench_harness.py    (writes docs/results/harness/summary.json; --tiny for a quick check)
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import options, publish

BATCH = 16
NEW_TOKENS = 64
TASKS = ("letters", "words", "endings", "last_word", "texts", "answers")
COLUMNS = ["model", "ours, first run", "ours", "lm-eval hf", "ratio", "of ours: start / load / requests", "of hf"]
SIZES: dict[str, dict[str, Any]] = {
    "Llama, 0.4M": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "Qwen3-MoE, 8 experts, 0.5M": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    },
    "Llama, 135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip


def words() -> list[str]:
    """Words of Python's standard library, without those that are long."""
    from moe_reduce.core.config import DataConfig
    from moe_reduce.data.sources import documents

    found: list[str] = []
    for document in documents(DataConfig(source="python-stdlib")):
        found += [word for word in document.split() if len(word) < 12]
        if len(found) > 200_000:
            break
    return found


def write_tasks(place: Path, text: list[str], questions: int) -> None:
    """Write the rows and the YAML files of the six tasks."""
    import yaml

    draw = random.Random(0)

    def phrase(low: int, high: int) -> str:
        start = draw.randrange(len(text) - high)
        return " ".join(text[start : start + draw.randint(low, high)])

    def choice(context: tuple[int, int], answers: Callable[[], list[str]]) -> tuple[dict[str, Any], list[Any]]:
        rows = [{"context": phrase(*context), "choices": answers(), "gold": number % 2} for number in range(questions)]
        return {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }, rows  # fmt: skip

    whole = [{"context": phrase(20, 120), "target": phrase(1, 1)} for _ in range(questions)]
    asked = {"doc_to_text": "{{context}}", "doc_to_target": "{{target}}"}
    made = {
        "letters": choice((60, 150), lambda: ["A", "B", "C", "D"]),
        "words": choice((8, 25), lambda: [phrase(1, 4) for _ in range(4)]),
        "endings": choice((20, 50), lambda: [phrase(8, 20) for _ in range(4)]),
        "last_word": ({"output_type": "loglikelihood"} | asked, whole),
        "texts": ({"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}"}, whole),
        "answers": (
            {
                "output_type": "generate_until",
                "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            }
            | asked,
            whole[: max(1, questions // 4)],
        ),
    }  # fmt: skip
    for name, (task, rows) in made.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(place / f"{name}.jsonl")}}
        task |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_model(place: Path, sizes: dict[str, Any], text: list[str]) -> None:
    """A random model with a SentencePiece tokenizer of 2,048 pieces."""
    import torch
    import transformers

    from moe_reduce.data.tokenizer_training import train_tokenizer

    kind: Any = (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    if "num_experts" in sizes:
        kind = (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM)
    torch.manual_seed(0)
    common = {"vocab_size": 2048, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    kind[1](kind[0](**(common | sizes))).save_pretrained(place)
    train_tokenizer(iter([" ".join(text[start : start + 1000]) for start in range(0, len(text), 1000)]), 2048).save(
        place
    )


def ours(model: Path, tasks: Path) -> tuple[list[float], Any]:
    """(CPU seconds after imports, after loading, and at the end; figures by task)."""
    import jax

    import moe_reduce
    from moe_reduce.core import compilation_cache
    from moe_reduce.core.config import ExecutionConfig
    from moe_reduce.inference import tasks as harness

    compilation_cache.enable()
    marks = [time.process_time()]
    loaded = moe_reduce.load(model, execution=ExecutionConfig().resolve(jax.default_backend()))
    marks.append(time.process_time())
    found = harness.figures(harness.evaluate(loaded, model, harness.Selection(TASKS, tasks), BATCH))
    return [*marks, time.process_time()], found


def theirs(model: Path, tasks: Path) -> tuple[list[float], Any]:
    """The same with `lm_eval --model hf`."""
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    marks = [time.process_time()]
    model_class: Any = huggingface.HFLM
    loaded = model_class(pretrained=str(model), device="cpu", dtype="float32", batch_size=BATCH)
    marks.append(time.process_time())
    evaluate: Any = lm_eval.simple_evaluate
    found = evaluate(loaded, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0)
    results = found["results"]
    figures = {
        task: {key.split(",")[0]: value for key, value in results[task].items() if isinstance(value, float)}
        for task in TASKS
    }
    return [*marks, time.process_time()], figures


def child(side: str, model: Path, tasks: Path) -> None:
    """Run one side, and print its CPU seconds with those of its own child processes, and its figures."""
    marks, figures = {"ours": ours, "theirs": theirs}[side](model, tasks)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([[*marks, time.process_time() + used.ru_utime + used.ru_stime], figures]))


def measured(side: str, model: Path, tasks: Path, cache: Path) -> tuple[list[float], Any]:
    """`child` in a new process, with its own compilation cache."""
    environment = os.environ | {
        "MOE_REDUCE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache.parent / "hf"),
    }
    command = [sys.executable, __file__, side, str(model), str(tasks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def check_equal(ours: Any, theirs: Any) -> None:
    """Raises unless both sides found the same figures."""
    for task in TASKS:
        for metric, value in theirs[task].items():
            np.testing.assert_allclose(ours[task][metric], value, rtol=1e-3, err_msg=f"{task} {metric}")


def compared(name: str, sizes: dict[str, Any], questions: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of both sides for a model, medians over the repeats, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model, tasks = place / "model", place / "tasks"
        tasks.mkdir()
        text = words()
        write_tasks(tasks, text, questions)
        write_model(model, sizes, text)
        first, _ = measured("ours", model, tasks, place / "cache")
        runs: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            found = {side: measured(side, model, tasks, place / "cache") for side in runs}
            check_equal(found["ours"][1], found["theirs"][1])
            for side, (marks, _) in found.items():
                runs[side].append(marks)
        middle = {side: np.median(marks, axis=0) for side, marks in runs.items()}
    return {"model": name, "first": first[-1]} | {side: marks.tolist() for side, marks in middle.items()}


def row(found: dict[str, Any]) -> list[str]:
    """A line of the table."""

    def parts(marks: list[float]) -> str:
        return " / ".join(f"{value:.1f}" for value in np.diff([0.0, *marks[:3]]))

    ours, theirs = found["ours"][-1], found["theirs"][-1]
    seconds = [f"{value:.1f} s" for value in (found["first"], ours, theirs)]
    return [found["model"], *seconds, f"{ours / theirs:.2f}", parts(found["ours"]), parts(found["theirs"])]


def main() -> None:
    """Measure all models and write the result."""
    given = options(__doc__ or "", "harness", 3)
    questions = 4 if given.tiny else 100
    names = list(SIZES)[: 2 if given.tiny else None]
    found = [compared(name, SIZES[name], questions, given.repeats) for name in names]
    publish(
        given.out,
        {
            "command": "python launch/bench_harness.py",
            "versions": {name: metadata.version(name) for name in ("lm_eval", "transformers", "torch", "jax")},
            "questions": questions, "batch_size": BATCH, "columns": COLUMNS, "rows": [row(one) for one in found],
            "measured": found,
        },
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ("ours", "theirs"):
        child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
