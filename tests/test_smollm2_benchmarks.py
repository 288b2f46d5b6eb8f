"""The benchmarks on SmolLM2: each request answered as lm-eval's own `hf` model answers it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import moe_reduce
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference.harness import Harness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
ROOT = Path(__file__).resolve().parent.parent
DIRECTORY, COPIES = ROOT / "runs/smollm2", ROOT.parent / "shared/data/benchmarks"
TOLERANCE = 1e-3
QUESTIONS = {  # of each task: those that generate take the longest
    "arc_easy": 20, "arc_challenge": 20, "boolq_without_passage": 20, "lambada_openai": 20, "gsm8k": 4, "svamp": 4,
    "mbpp": 4, "humaneval": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[Harness, HFLM]:
    for place in (DIRECTORY, COPIES):
        if not place.is_dir():
            pytest.skip(f"needs {place} (SmolLM2 by ./launch/smollm2.sh, and copies of the benchmarks)")
    model = moe_reduce.load(DIRECTORY, execution=ExecutionConfig().resolve("cpu"))
    theirs = HFLM(pretrained=str(DIRECTORY), device="cpu", dtype="float32", batch_size=4)
    return Harness(model, load_tokenizer(DIRECTORY), 16), theirs


def responses(lm: Any, task: str) -> tuple[list[Any], dict[str, float]]:
    """Every request with its response, and the figures."""
    path = str(ROOT / "launch/benchmarks")
    manager = TaskManager(include_path=path, include_defaults=False, metadata={"data": str(COPIES)})
    found: Any = simple_evaluate(
        lm, tasks=[task], task_manager=manager, limit=QUESTIONS[task], bootstrap_iters=0, confirm_run_unsafe_code=True
    )
    samples = found["samples"][task]
    asked = [pair for one in samples for pair in zip(one["arguments"], one["resps"], strict=True)]
    figures = {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
    return [(arguments, answers[0]) for arguments, answers in asked], figures


@pytest.mark.parametrize("task", QUESTIONS)
def test_every_request_is_answered_as_by_the_hf_model(models: tuple[Harness, HFLM], task: str):
    (ours, figures), (theirs, expected) = (responses(lm, task) for lm in models)
    assert [arguments for arguments, _ in ours] == [arguments for arguments, _ in theirs]
    for (arguments, mine), (_, other) in zip(ours, theirs, strict=True):
        if isinstance(other, str):
            assert mine == other, arguments
        else:
            np.testing.assert_allclose(mine[0], other[0], rtol=TOLERANCE, err_msg=str(arguments))
            assert mine[1] == other[1], arguments
    assert figures == pytest.approx(expected, rel=TOLERANCE)
