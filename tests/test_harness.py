"""lm-eval on our models: every request as its own `hf` model answers it; local tasks through the command; baselines."""

import json
import random
import shutil

import jax
import numpy as np
import pytest
import torch
import yaml
from conftest import text
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers_models import written

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core.config import ExecutionConfig, MeshConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.data.tokenizers import load_tokenizer
from moe_reduce.inference import scoring
from moe_reduce.inference.generate import ready
from moe_reduce.inference.harness import Harness
from moe_reduce.inference.retained import lost, retained
from moe_reduce.training.sharding import make_mesh

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
CONTEXT = 96
WORDS = text(documents=30, seed=1).replace(".", "").split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory(kind): a tiny random model of transformers, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, object] = {}

    def of(kind):
        if kind not in made:
            place = root / kind
            model = written(place, kind, vocab_size=300, max_position_embeddings=CONTEXT)
            with torch.no_grad():
                # control tokens and bytes are never written, so that texts do not hang on how half characters are shown
                model.lm_head.weight[:259] = 0.0
            model.save_pretrained(place)
            train_tokenizer(iter([text(documents=40, seed=0)]), 300).save(place)
            made[kind] = place
        return made[kind]

    return of


def ours(directory, batch_size=4, mesh=None) -> Harness:
    model = moe_reduce.load(directory, execution=ExecutionConfig().resolve("cpu"))
    return Harness(model, load_tokenizer(directory), batch_size, mesh=mesh)


def theirs(directory) -> HFLM:
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)


def requests(kind, arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def phrases(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_every_likelihood_is_that_of_the_hf_model(directory, kind):
    contexts, endings = phrases(7, 2), phrases(12, 3)
    pairs = [(context, " " + ending) for context in contexts for ending in endings[:3]]  # contexts with several endings
    pairs += [("", endings[4]), (contexts[0] + " ", endings[5]), pairs[3]]  # none, a trailing space, the same again
    pairs.append((" ".join(phrases(12, 4)), " " + phrases(1, 5)[0]))  # longer than the model can read
    found = ours(directory(kind)).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs(directory(kind)).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=0, atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_likelihoods_are_those_of_the_hf_model(directory):
    texts = [(phrase,) for phrase in [*phrases(3, 6), " ".join(phrases(40, 7))]]
    found = ours(directory("llama")).loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    expected = theirs(directory("llama")).loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_generated_texts_are_those_of_the_hf_model(directory):
    settings = [{"until": ["\n"], "max_gen_toks": 12}, {"until": [WORDS[3][:2]], "max_gen_toks": 7, "do_sample": False}]
    asked = [(phrase, settings[number % 2]) for number, phrase in enumerate(phrases(6, 8))]
    found = ours(directory("llama")).generate_until(requests("generate_until", asked), disable_tqdm=True)
    expected = theirs(directory("llama")).generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == expected
    assert any(found)


def test_sampled_texts_differ_between_batches(directory):
    sampled = {"until": [], "max_gen_toks": 12, "temperature": 1.0}
    for settings in (sampled, sampled | {"do_sample": True}):
        asked = requests("generate_until", [(WORDS[0], settings)] * 4)
        found = ours(directory("llama"), batch_size=2).generate_until(asked, disable_tqdm=True)
        assert len(set(found)) == 4
    greedy = requests("generate_until", [(WORDS[0], sampled | {"do_sample": False})] * 4)
    assert len(set(ours(directory("llama"), batch_size=2).generate_until(greedy, disable_tqdm=True))) == 1


def test_a_context_is_read_once(directory, monkeypatch):
    model = ready(moe_reduce.load(directory("llama"), execution=ExecutionConfig().resolve("cpu")))
    read = []
    original = scoring._read

    def counted(*arguments):
        *_, tokens_BT, _ = arguments
        read.append(tokens_BT.shape)
        return original(*arguments)

    monkeypatch.setattr(scoring, "_read", counted)
    pairs = [([1, 2, 3], [number]) for number in range(20)] + [([4, 5], [6, 7])]
    scored = dict(scoring.score(model, pairs, batch_size=4))
    assert read == [(4, 16)]
    assert sorted(scored) == list(range(21))
    total = np.logaddexp.reduce([scored[number].log_likelihood for number in range(20)])
    assert total < 0
    logits = np.asarray(model_logits(directory("llama"), [1, 2, 3]))
    logits = logits - np.logaddexp.reduce(logits)
    np.testing.assert_allclose([scored[n].log_likelihood for n in range(20)], logits[:20], atol=1e-4)


def model_logits(directory, ids):
    return moe_reduce.load(directory, execution=ExecutionConfig().resolve("cpu"))([ids])[0, -1]


@pytest.fixture
def tasks(tmp_path):
    """A directory with a multiple-choice task and a generation task on local files."""
    place = tmp_path / "tasks"
    place.mkdir()
    rows = [
        {"question": a, "choices": phrases(3, number), "answer": number % 3} for number, a in enumerate(phrases(9, 9))
    ]
    (place / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.json")}},
        "test_split": "test",
    }
    choice = {
        "task": "local_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (place / "choice.yaml").write_text(yaml.safe_dump(common | choice))
    filters = {
        "whole": [{"function": "take_first"}],
        "constant": [{"function": "regex", "regex_pattern": "(?!)", "fallback": "0"}, {"function": "take_first"}],
    }
    filtered = {
        "task": "local_filters", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": name, "filter": steps} for name, steps in filters.items()],
    }  # fmt: skip
    (place / "filters.yaml").write_text(yaml.safe_dump(common | filtered))
    return place


def evaluated(tmp_path, capsys, *arguments):
    out = tmp_path / "out"
    status = main(["evaluate", f"--out={out}", "--overwrite", *map(str, arguments)])
    captured = capsys.readouterr()
    return json.loads((out / "summary.json").read_text()) if status == 0 else captured.err


@pytest.mark.parametrize("limit", [None, 5])
def test_a_local_task_through_the_command(directory, tasks, tmp_path, capsys, limit):
    model = directory("llama")
    some = [] if limit is None else [f"--limit={limit}"]
    arguments = [f"--model={model}", f"--baseline={model}", "--tasks=local_choice", f"--task-path={tasks}", *some]
    found = evaluated(tmp_path, capsys, *arguments)
    assert isinstance(found, dict), found
    accuracy = found["tasks"]["local_choice"]["acc"]
    assert 0 <= accuracy <= 1
    assert round(accuracy * (limit or 9), 6).is_integer()
    beside = found["beside_baseline"]["local_choice"]["acc"]
    assert beside["model"] == beside["baseline"] == pytest.approx(accuracy)
    assert (found["limit"], found["few_shot"], found["task_path"]) == (limit, None, str(tasks))
    assert beside["retained"] == beside["low"] == beside["high"] == 1.0


def test_each_filter_of_a_task_has_figures_of_its_own(directory, tasks, tmp_path, capsys):
    model = directory("llama")
    arguments = [f"--model={model}", f"--baseline={model}", "--tasks=local_filters", f"--task-path={tasks}"]
    found = evaluated(tmp_path, capsys, *arguments)
    expected = {"exact_match,whole": 0.0, "exact_match,constant": pytest.approx(1 / 3)}  # answers are 0, 1, 2, 0, ...
    assert found["tasks"]["local_filters"] == expected
    beside = found["beside_baseline"]["local_filters"]
    assert {metric: compared["model"] for metric, compared in beside.items()} == expected


def test_a_baseline_on_a_corpus(directory, corpus, tmp_path, capsys):
    model, other = directory("llama"), directory("qwen3_moe")
    arguments = [f"--data={corpus}/*.txt", "--sequence-length=32", "--max-batches=3", f"--cache={tmp_path / 'tokens'}"]
    found = evaluated(tmp_path, capsys, f"--model={model}", f"--baseline={other}", *arguments)
    alone = evaluated(tmp_path, capsys, f"--model={other}", *arguments)
    loss = found["beside_baseline"]["loss"]
    assert loss["model"] == pytest.approx(found["loss"])
    assert loss["baseline"] == pytest.approx(alone["loss"])
    assert loss["difference"] == pytest.approx(found["loss"] - alone["loss"])
    assert loss["low"] < loss["difference"] < loss["high"]


def test_a_baseline_reads_the_same_tokens(directory, corpus, tmp_path, capsys):
    model, other = directory("llama"), tmp_path / "other"
    shutil.copytree(model, other)
    train_tokenizer(iter([text(documents=40, seed=5)]), 300).save(other)
    arguments = [f"--model={model}", f"--baseline={other}", f"--data={corpus}/*.txt", "--sequence-length=32"]
    arguments += ["--max-batches=1", f"--cache={tmp_path / 'tokens'}"]
    error = evaluated(tmp_path, capsys, *arguments)
    assert "has another tokenizer than --model" in error
    assert error.count("\n") == 1
    found = evaluated(tmp_path, capsys, *arguments, f"--tokenizer={model}")
    assert found["beside_baseline"]["loss"]["difference"] == 0


def test_two_devices_find_what_one_does(directory, corpus, tasks, tmp_path, capsys):
    model, other = directory("llama"), directory("qwen3_moe")
    beside = [f"--model={model}", f"--baseline={other}"]
    text = ["--sequence-length=32", "--max-batches=3", f"--cache={tmp_path / 'tokens'}"]
    for what in ([f"--data={corpus}/*.txt", *text], ["--tasks=local_choice", f"--task-path={tasks}"]):
        whole = evaluated(tmp_path, capsys, *beside, *what)
        split = evaluated(tmp_path, capsys, *beside, *what, "--tensor=2")
        assert figures(split) == pytest.approx(figures(whole), rel=1e-5)
    assert "must be a multiple of --tensor (3)" in evaluated(tmp_path, capsys, *beside, *what, "--tensor=3")


def figures(found, path=()):
    """Its numbers by path."""
    if not isinstance(found, dict):
        return {path: found} if isinstance(found, (int, float)) else {}
    return {place: value for key in found for place, value in figures(found[key], (*path, key)).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_every_device_has_its_part_of_the_model_alone(directory, kind):
    mesh = make_mesh(MeshConfig(data=1, tensor=2))
    whole, split = ours(directory(kind)), ours(directory(kind), mesh=mesh)
    pairs = [(context, " " + ending) for context in phrases(4, 2) for ending in phrases(2, 3)]
    asked = requests("loglikelihood", pairs)
    expected = whole.loglikelihood(asked, disable_tqdm=True)
    found = split.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert held(split) < 0.6 * held(whole)  # norms and routers are whole on each


def held(harness) -> int:
    """Bytes of the first device."""
    leaves = jax.tree.leaves(harness._model.params)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def test_intervals_hold_what_they_should():
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(40):
        theirs = (draw.random(400) < 0.8).astype(float)
        ours = theirs * (draw.random(400) < 0.9)
        found = retained(ours, theirs)
        inside += found["low"] <= 0.9 <= found["high"]
        assert found["high"] - found["low"] < 0.12
    assert inside >= 33
    weights = np.arange(1.0, 401.0)
    shifted = lost(weights * 2.0, weights * 1.5, weights)
    assert shifted["difference"] == shifted["low"] == shifted["high"] == 0.5
    none = retained(np.ones(9), np.zeros(9))
    assert none == {"model": 1.0, "baseline": 0.0, "retained": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --data=CORPUS or --tasks=NAMES"),
        (["--tasks=no_such_task"], "--tasks=no_such_task is unknown"),
        (["--tasks=local_choice", "--limit=0"], "--limit must be positive"),
    ],
)
def test_mistakes_are_one_line(directory, tasks, tmp_path, capsys, arguments, words):
    error = evaluated(tmp_path, capsys, f"--model={directory('llama')}", f"--task-path={tasks}", *arguments)
    assert words in error
    assert error.count("\n") == 1


def test_a_generation_without_room_is_refused(directory):
    asked = requests("generate_until", [("a", {"until": [], "max_gen_toks": CONTEXT})])
    with pytest.raises(UserError, match=f"of which the model can hold {CONTEXT}"):
        ours(directory("llama")).generate_until(asked, disable_tqdm=True)
