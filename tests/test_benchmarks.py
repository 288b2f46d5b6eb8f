"""The benchmarks: prompts like lm-eval's own, copies as they are read, programs in limits, intervals, the table."""

import gzip
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import text
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers_models import written

from moe_reduce.__main__ import main
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.inference import task_files, tasks
from moe_reduce.inference.retained import interval
from moe_reduce.inference.tasks import Metric

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
ROOT = Path(__file__).resolve().parent.parent
LAUNCH, COPIES = ROOT / "launch", ROOT.parent / "shared/data/benchmarks"
THEIRS = {
    "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml", "gsm8k": "gsm8k/gsm8k.yaml",
    "boolq_without_passage": "super_glue/boolq/default.yaml", "lambada_openai": "lambada/lambada_openai.yaml",
    "humaneval": "humaneval/humaneval.yaml", "mbpp": "mbpp/mbpp.yaml",
}  # fmt: skip
ASKED = (
    "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "generation_kwargs", "repeats",
    "num_fewshot", "unsafe_code",
)  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """launched(name): a module of launch/ or launch/benchmarks/."""
    monkeypatch.syspath_prepend(str(LAUNCH / "benchmarks"))
    monkeypatch.syspath_prepend(str(LAUNCH))
    yield importlib.import_module
    for name in ("benchmarks", "documents", "programs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("task", THEIRS)
def test_questions_are_asked_as_by_lm_evals_own_task(task):
    ours = load_yaml(LAUNCH / f"benchmarks/{task}.yaml", resolve_func=False)
    theirs = load_yaml(Path(lm_eval_tasks.__file__).parent / THEIRS[task], resolve_func=False)
    if task == "boolq_without_passage":
        theirs["doc_to_text"] = theirs["doc_to_text"].removeprefix("{{passage}}\n")
    assert {name: ours.get(name) for name in ASKED} == {name: theirs.get(name) for name in ASKED}
    if task in ("humaneval", "mbpp"):
        return  # scored by programs.py instead of the hub's code_eval
    assert ours.get("filter_list") == theirs.get("filter_list")
    settings = [name for metric in ours["metric_list"] for name in metric]
    kept = [{name: value for name, value in metric.items() if name in settings} for metric in theirs["metric_list"]]
    asked = [
        {name: metric.get(name) for name in theirs} for metric, theirs in zip(ours["metric_list"], kept, strict=True)
    ]
    assert asked == kept


def write_copies(place: Path) -> Path:
    """Copies of every benchmark with questions of our own, in the formats of the published ones."""
    words = ["red", "blue", "green", "black"]

    def arc(count):
        listed = " ".join(f"Answer{number}: {word} paint" for number, word in enumerate(words[:count], 1))
        names = "/".join(f"answer{number}" for number in range(1, count + 1))
        asked = f"Please choose the correct answer to the question: Which paint is {words[1]}?\n\n{listed}"
        return {"instruction": f"{asked}\n\nAnswer format: {names}", "answer": "answer2"}

    boolq = (
        "Please answer the following question with true or false, question: is snow {}?\n\nAnswer format: true/false"
    )
    sums = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    programs = [
        {
            "task_id": number, "text": f"Write a function that adds {number}.",
            "code": f"def add(x):\r\n  return x + {number}",
            "test_list": [f"assert add({x}) == {x + number}" for x in range(3)], "test_setup_code": "",
        }
        for number in (1, 2, 3, 4, 11, 12, 510, 511)
    ]  # fmt: skip
    rows = {
        "ARC-Easy/train.json": [arc(4)], "ARC-Easy/test.json": [arc(4), arc(3)],
        "ARC-Challenge/train.json": [arc(4)], "ARC-Challenge/test.json": [arc(4), arc(3)] * 2,
        "boolq/train.json": [{"instruction": boolq.format("hot"), "answer": "false"}],
        "boolq/test.json": [{"instruction": boolq.format(word), "answer": "true"} for word in ("cold", "white")],
        "lambada/lambada_test.jsonl": [{"text": text(documents=1, seed=n)[:60].strip()} for n in range(6)],
        "gsm8k/train.jsonl": sums, "gsm8k/test.jsonl": sums[:2],
        "SVAMP/test.json": [{"instruction": "Two?", "answer": "2.0"}, {"instruction": "Half?", "answer": "0.5"}],
        "humaneval/HumanEval.jsonl": [
            {"task_id": "a", "prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n  assert f() == 1"}
        ],
        "mbpp/mbpp.jsonl": programs,
    }  # fmt: skip
    for name, found in rows.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(found) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in found)
        if "test" in name:  # compressed or not
            (place / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        else:
            (place / name).write_text(content)
    return place


def loaded(task, data):
    place = str(LAUNCH / "benchmarks")
    manager = TaskManager(include_path=place, include_defaults=False, metadata={"data": str(data)})
    return manager.load([task])["tasks"][task]


def test_copies_become_the_questions_of_the_tasks(tmp_path):
    data = write_copies(tmp_path)
    task = loaded("arc_easy", data)
    first, second = task.eval_docs
    assert task.doc_to_text(first) == "Question: Which paint is blue?\nAnswer:"
    assert task.doc_to_choice(first) == ["red paint", "blue paint", "green paint", "black paint"]
    assert task.doc_to_choice(second) == ["red paint", "blue paint", "green paint"]
    assert task.doc_to_target(first) == 1
    task = loaded("boolq_without_passage", data)
    first, _ = task.eval_docs
    assert (task.doc_to_text(first), task.doc_to_target(first)) == ("Question: is snow cold?\nAnswer:", 1)
    task = loaded("svamp", data)
    assert [task.doc_to_target(one) for one in task.eval_docs] == ["#### 2", "#### 0.5"]
    assert task.doc_to_text(task.eval_docs[0]) == "Question: Two?\nAnswer:"
    assert task.process_results(task.eval_docs[0], ["2"]) == {"exact_match": 1.0}
    assert len(task.fewshot_docs()) == 8


def test_code_tasks_complete_the_prompt_and_show_three_solved_ones(tmp_path):
    data = write_copies(tmp_path)
    task = loaded("mbpp", data)
    assert [one["task_id"] for one in task.eval_docs] == [11, 12, 510]
    task.set_config(key="num_fewshot", value=3)
    prompt = task.fewshot_context(task.eval_docs[0], 3)
    examples = [prompt.index(f"return x + {number}") for number in (2, 3, 4)]
    assert examples == sorted(examples)
    assert prompt.count("[DONE]") == 3
    assert "+ 11" not in prompt
    assert task.process_results(task.eval_docs[0], ["def add(x):\n  return x + 11"]) == {"pass_at_1": 1.0}
    assert task.process_results(task.eval_docs[0], ["def add(x):\n  return 13"]) == {"pass_at_1": 0.0}
    task = loaded("humaneval", data)
    (document,) = task.eval_docs
    (completed,) = task._filters[0].filters[0]().apply([["  return 1\n"]], [document])
    assert completed == ["def one():\n  return 1\n"]
    assert task.process_results(document, [completed]) == {"pass_at_1": 1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [("ARC-Easy/test.json", None), ("boolq/test.json", '[{"instruction": "?"}]'), ("mbpp/mbpp.jsonl", "{")],
)
def test_a_copy_that_cannot_be_read_is_named(launched, tmp_path, name, content):
    data = write_copies(tmp_path)
    (data / f"{name}.gz").unlink(missing_ok=True)
    if content is not None:
        (data / name).write_text(content)
    read = {"ARC-Easy": "arc_easy", "boolq": "boolq", "mbpp": "mbpp"}[name.split("/")[0]]
    with pytest.raises(OSError, match=r"test\.json|LLM-Adapters: '\?'|mbpp.jsonl is damaged"):
        getattr(launched("documents"), read)(str(data))


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("assert sum([1, 2]) == 3", True),
        ("print('x' * 2**20)", True),
        ("assert sum([1, 2]) == 4", False),
        ("def (", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("x = bytearray(2**31)", False),
        ("open('x', 'w').write('x' * 2**21)", False),
        ("import os; assert not os.listdir('.') and 'HOME' not in os.environ", True),
    ],
)
def test_a_program_passes_if_it_runs_to_its_end_within_limits(launched, program, passes):
    assert launched("programs").passes(program) is passes


def test_a_program_reaches_no_network_and_ends_in_time(launched, monkeypatch, unused_port_server):
    programs = launched("programs")
    port, accepted = unused_port_server
    assert not programs.passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
    assert accepted() == 0
    monkeypatch.setattr(programs, "SECONDS", 0.5)
    assert not programs.passes("import time; time.sleep(60)")
    monkeypatch.setattr(programs, "SECONDS", 60)
    monkeypatch.setattr(programs, "PROCESSOR_SECONDS", 1)
    assert not programs.passes("while True: pass")


@pytest.fixture
def unused_port_server():
    """(a port that listens on this machine, function that counts the connections that came)."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def accepted():
            try:
                server.accept()[0].close()
            except BlockingIOError:
                return 0
            return 1

        yield server.getsockname()[1], accepted


def test_intervals_of_shares_are_wilsons_and_of_others_bootstrapped():
    assert interval([1] * 8 + [0] * 2, mean) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert interval([0] * 20, mean) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    values = np.random.default_rng(0).normal(-2.0, 1.0, 400).tolist()
    low, high = interval(values, perplexity)
    assert low < perplexity(values) < high
    half = 1.96 * np.std(values) / 20
    assert np.log((low, high)) == pytest.approx(np.log(perplexity(values)) + np.array([-half, half]), abs=0.02)


def test_results_are_read_as_they_were_written(tmp_path):
    def own(values):
        return max(values)

    hashes = ["a", "b"]
    results = {
        "one": {
            "acc": Metric(0.5, [1.0, 0.0], mean, True, hashes),
            "perplexity": Metric(7.4, [np.float64(-2.0), -2.0], perplexity, False, hashes),
            "brier": Metric(0.1, [(0, np.ones(2)), None], AGGREGATION_REGISTRY["brier_score"], False, hashes),
        },
        "two": {"own": Metric(1.0, [1.0, 0.0], own, None, hashes)},
    }
    task_files.write(results, tmp_path / "questions.json")
    found = task_files.read(tmp_path / "questions.json")
    assert found["one"]["acc"] == results["one"]["acc"]
    assert found["one"]["perplexity"] == results["one"]["perplexity"]
    assert found["one"]["brier"].values == [[0, [1.0, 1.0]], None]
    assert found["two"]["own"][:2] == (1.0, ())
    assert tasks.compare(found, found)["two"]["own"]["retained"] is None
    changed = {"one": {"acc": results["one"]["acc"]._replace(questions=["a", "c"])}}
    with pytest.raises(UserError, match="other questions of one"):
        tasks.compare(changed, found)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama, with a tokenizer."""
    place = tmp_path_factory.mktemp("model") / "tiny"
    made = written(place, "llama", vocab_size=300, max_position_embeddings=1600)
    with torch.no_grad():
        made.lm_head.weight[:259] = 0.0
    made.save_pretrained(place)
    train_tokenizer(iter([text(documents=40, seed=0)]), 300).save(place)
    return place


def test_programs_of_a_model_run_only_if_that_is_allowed(model, tmp_path, capsys):
    given = [
        f"--model={model}",
        "--tasks=humaneval",
        f"--task-path={LAUNCH / 'benchmarks'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert main(["evaluate", *given, f"--task-data={write_copies(tmp_path / 'data')}"]) == 2
    error = capsys.readouterr().err
    assert "--tasks=humaneval executes programs that the model writes: add --allow-code" in error
    assert error.count("moe-reduce evaluate:") == 1


def script(launched, monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of the benchmarks' command."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.sh", *map(str, arguments)])
    status = launched("benchmarks").main()
    return (status, *capsys.readouterr())


def test_the_table_is_by_domain_resumed_and_beside_a_baseline(launched, monkeypatch, capsys, model, tmp_path):
    data, out = write_copies(tmp_path / "data"), tmp_path / "out"
    given = [f"--data={data}", "--tasks=arc_easy,arc_challenge,boolq,lambada_openai,mbpp"]
    status, printed, error = script(launched, monkeypatch, capsys, model, *given, f"--out={out}")
    assert (status, "left out, because they execute what the model writes: mbpp" in printed) == (0, True), error
    assert printed.splitlines()[-1] == str(out / "summary.json")
    result = json.loads((out / "summary.json").read_text())
    assert [row[:4] for row in result["rows"]] == [
        ["multiple choice", "ARC easy", "acc_norm", "2"], ["multiple choice", "ARC challenge", "acc_norm", "4"],
        ["multiple choice", "BoolQ without passages", "acc", "2"], ["multiple choice", "mean", "", "8"],
        ["text", "LAMBADA", "acc", "6"], ["text", "LAMBADA", "perplexity", "6"],
    ]  # fmt: skip
    assert str(data) not in json.dumps(result)
    assert result["command"] == f"./launch/benchmarks.sh {model} {given[1]} --data=DIR"
    assert {len(row) for row in result["rows"]} == {len(result["columns"])} == {6}
    shutil.rmtree(out / "arc_challenge")
    before = os.stat(out / "arc_easy/summary.json").st_mtime_ns
    status, _, error = script(launched, monkeypatch, capsys, model, *given, f"--out={out}", f"--baseline={out}")
    assert (status, os.stat(out / "arc_easy/summary.json").st_mtime_ns) == (0, before), error
    assert "arc_easy: finished earlier" in error
    assert (out / "arc_challenge/summary.json").is_file()
    result = json.loads((out / "summary.json").read_text())
    kept = {tuple(row[:3]): row[7:] for row in result["rows"]}
    assert kept["text", "LAMBADA", "perplexity"] == ["100.0%", "100.0–100.0%"]
    assert {row[0] for row in kept.values()} <= {"100.0%", "–"}
    status, _, error = script(launched, monkeypatch, capsys, model, *given, f"--out={out}", "--limit=1")
    assert (status, error.count("\n")) == (2, 1)
    assert "holds results of another limit" in error
    short = [f"--data={data}", "--tasks=arc_easy", "--limit=1", f"--out={tmp_path / 'short'}", f"--baseline={out}"]
    status, _, error = script(launched, monkeypatch, capsys, model, *short)
    assert (status, "answered other questions of arc_easy" in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none does not exist"),
        (["MODEL", "--tasks=mmlu"], "--tasks=mmlu is not one of arc_easy, "),
        (["MODEL", "--data=none"], "none does not exist"),
        (["MODEL", "--adapter=none"], "none does not exist"),
    ],
)
def test_mistakes_are_one_line(launched, monkeypatch, capsys, model, tmp_path, arguments, message):
    given = [str(model) if one == "MODEL" else one for one in arguments]
    status, _, error = script(
        launched,
        monkeypatch,
        capsys,
        *given,
        f"--out={tmp_path / 'out'}",
    )
    assert (status, error.count("\n")) == (2, 1)
    assert message in error


@pytest.mark.skipif(not COPIES.is_dir(), reason=f"{COPIES} is not on this machine")
def test_published_copies_are_whole():
    counts = {
        "arc_easy": 2376, "arc_challenge": 1172, "boolq_without_passage": 3270, "lambada_openai": 5153, "gsm8k": 1319,
        "svamp": 1000, "humaneval": 164, "mbpp": 500,
    }  # fmt: skip
    assert {task: len(loaded(task, COPIES).eval_docs) for task in counts} == counts
