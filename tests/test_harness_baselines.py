"""The share of a baseline's quality that a model keeps, for every kind of metric that lm-eval's tasks have."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import text
from transformers_models import written

from moe_reduce.__main__ import main
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.inference.retained import retained_figure, retained_metric, share

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
WORDS = text(documents=30, seed=1).replace(".", "").split()
UTILS = """
def process_results(doc, results):
    likelihood, greedy = results[0]
    found = {"log_p": likelihood, "surprise": -likelihood, "bare": likelihood}
    return found if doc["count"] > 3 else found | {"rare": 1.0}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a random model, the same with a head of zeros, which finds all tokens equally probable)."""
    root = tmp_path_factory.mktemp("models")
    model = written(root / "random", "llama", vocab_size=300, max_position_embeddings=96)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(root / "even")
    for name in ("random", "even"):
        train_tokenizer(iter([text(documents=40, seed=0)]), 300).save(root / name)
    return root / "random", root / "even"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    draw = random.Random(3)
    rows = [
        {
            "context": " ".join(draw.choices(WORDS, k=6)),
            "target": draw.choice(WORDS),
            "count": number,
            "gold": number % 2,
        }
        for number in range(9)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "utils.py").write_text(UTILS)
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{context}}", "doc_to_target": "{{target}}",
    }  # fmt: skip

    def write(name, **task):
        (place / f"{name}.yaml").write_text(yaml.safe_dump(common | {"task": name} | task))

    write("own_last", output_type="loglikelihood", metric_list=[{"metric": "perplexity"}, {"metric": "acc"}])
    write("own_texts", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}")
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": ["{{target}}", "{{context}}"],
        "doc_to_target": "{{gold}}",
    }
    write("own_choice", **choice, metric_list=[{"metric": "acc"}, {"metric": "brier_score"}, {"metric": "mcc"}])
    custom = [("log_p", True), ("surprise", False), ("rare", True)]
    listed = [{"metric": name, "aggregation": "mean", "higher_is_better": higher} for name, higher in custom]
    write("own_custom", output_type="loglikelihood", process_results="PLACE", metric_list=listed)
    file = place / "own_custom.yaml"
    file.write_text(file.read_text().replace("PLACE", "!function utils.process_results"))
    group = {"group": "own_group", "task": ["own_last", "own_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (place / "group.yaml").write_text(yaml.safe_dump(group))
    return place


def evaluated(tmp_path, names, tasks, model, *more):
    out = tmp_path / "out"
    arguments = [f"--model={model}", f"--tasks={names}", f"--task-path={tasks}", *more]
    assert main(["evaluate", *arguments, f"--out={out}", "--overwrite"]) == 0
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def beside(models, tasks, tmp_path_factory):
    """(figures, comparison) of the random model, which is the worse one, beside the other, and the other's figures."""
    names, place = "own_texts,own_custom,own_group", tmp_path_factory.mktemp("beside")
    found = evaluated(place, names, tasks, models[0], f"--baseline={models[1]}")
    return found["tasks"], found["beside_baseline"], evaluated(place, names, tasks, models[1])["tasks"]


def test_a_task_named_twice_is_one_line(models, tasks, tmp_path, capsys):
    arguments = [
        f"--model={models[0]}",
        "--tasks=own_last,own_group",
        f"--task-path={tasks}",
        f"--out={tmp_path / 'out'}",
    ]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Duplicate task 'own_last'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "metric", "is_ratio"),
    [
        ("own_last", "perplexity", "baseline / model"),
        ("own_texts", "word_perplexity", "baseline / model"),
        ("own_texts", "byte_perplexity", "baseline / model"),
        ("own_texts", "bits_per_byte", "baseline / model"),
        ("own_choice", "brier_score", "baseline / model"),
        ("own_custom", "log_p", "baseline / model"),  # negative, and higher is better
        ("own_custom", "surprise", "baseline / model"),
        ("own_custom", "rare", "model / baseline"),
    ],
)
def test_figures_are_those_of_the_metric_and_a_worse_model_keeps_less(beside, task, metric, is_ratio):
    ours, compared, theirs = (found[task][metric] for found in beside)
    assert (compared["model"], compared["baseline"]) == pytest.approx((ours, theirs))
    assert compared["retained_is"] == is_ratio
    if metric == "rare":
        assert compared["retained"] == compared["low"] == compared["high"] == 1.0
        return
    expected = ours / theirs if is_ratio == "model / baseline" else theirs / ours
    assert compared["retained"] == pytest.approx(expected)
    assert (compared["retained"] < 1) == (ours < theirs if compared["higher_is_better"] else ours > theirs)
    assert compared["low"] <= compared["retained"] <= compared["high"]


def test_perplexities_are_positive_and_not_mean_log_likelihoods(beside):
    figures, compared, _ = beside
    assert compared["own_last"]["perplexity"]["model"] == pytest.approx(figures["own_last"]["perplexity"])
    assert compared["own_last"]["perplexity"]["model"] > compared["own_last"]["perplexity"]["baseline"] > 1
    assert compared["own_last"]["perplexity"]["retained"] < 1
    surprise = figures["own_custom"]["surprise"]
    assert figures["own_last"]["perplexity"] == pytest.approx(math.exp(surprise), rel=1e-6)


def test_a_metric_without_a_direction_has_no_share(beside):
    compared = beside[1]["own_custom"]["bare"]
    assert compared["retained"] is None
    assert compared["retained_is"].startswith("undefined: the task does not say")


def test_a_group_is_compared_without_an_interval(beside):
    ours, compared, theirs = (found["own_group"]["acc"] for found in beside)
    assert (compared["model"], compared["baseline"]) == (ours, theirs)
    assert compared["low"] is compared["high"] is None
    assert compared["higher_is_better"] is True


def test_a_model_beside_itself_keeps_all(models, tasks, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models[0], copy)
    names = "own_last,own_texts,own_choice"
    found = evaluated(tmp_path, names, tasks, models[0], f"--baseline={copy}")["beside_baseline"]
    kept = [compared["retained"] for metrics in found.values() for compared in metrics.values()]
    assert all(one in (1.0, None) for one in kept)
    assert kept.count(1.0) >= 6


@pytest.mark.parametrize(
    ("model", "baseline", "higher", "kept"),
    [
        (0.4, 0.5, True, 0.8),
        (50.0, 40.0, False, 0.8),
        (-50.0, -40.0, True, 0.8),
        (-40.0, -50.0, False, 0.8),
        (0.0, 0.5, True, 0.0),
        (0.5, 0.0, False, 0.0),
        (0.0, 0.5, False, None),  # no error at all: any share of nothing
        (0.0, 0.0, True, None),
        (-0.1, 0.2, True, None),
        (0.4, 0.5, None, None),
        (math.inf, 40.0, False, None),
    ],
)
def test_the_share_is_below_one_for_a_worse_model(model, baseline, higher, kept):
    found = retained_figure(model, baseline, higher)
    assert found["retained"] == (kept if kept is None else pytest.approx(kept))
    assert found["retained_is"] == share(model, baseline, higher)[0]


def test_intervals_of_other_aggregations_hold_what_they_should():
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(40):
        base = draw.normal(-2.0, 1.0, 300)
        ours = base + draw.normal(-0.5, 0.5, 300)  # e^-0.5 of the perplexity
        found = retained_metric(ours, base, lambda values: math.exp(-sum(values) / len(values)), False, draws=300)
        inside += found["low"] <= math.exp(-0.5) <= found["high"]
        assert found["high"] - found["low"] < 0.12
    assert inside >= 33


def test_nothing_is_asked_of_git(models, tasks, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    evaluated(tmp_path, "own_last", tasks, models[0])
    assert "git" not in capfd.readouterr().err
