"""inspect, plan, evaluate and report, through the real command line."""

import argparse
import json
import math
import re

import jax
import numpy as np
import pytest

from moe_reduce import save
from moe_reduce.__main__ import main
from moe_reduce.commands import evaluate
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reports import adaptation_table, training_table


@pytest.fixture
def model_directory(tiny_shared, tmp_path):
    params = jax.tree.map(np.asarray, init_params(tiny_shared, jax.random.key(0)))
    save(Model(tiny_shared, params, ExecutionConfig().resolve("cpu")), tmp_path / "model")
    return tmp_path / "model"


def test_inspect_counts_and_verifies(model_directory, capsys):
    assert main(["inspect", f"--model={model_directory}", "--json", "--verify"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model_type"] == "moe_reduce"
    assert content["parameters"] == sum(content["by_component"].values())
    assert content["bytes"] == 4 * content["parameters"]
    weights = model_directory / "model.safetensors"
    broken = bytearray(weights.read_bytes())
    broken[-1] ^= 1
    weights.write_bytes(broken)
    assert main(["inspect", f"--model={model_directory}"]) == 0
    capsys.readouterr()
    assert main(["inspect", f"--model={model_directory}", "--verify"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    (model_directory / "manifest.json").unlink()
    assert main(["inspect", f"--model={model_directory}", "--verify"]) == 2
    assert "has no manifest.json to check against: leave out --verify" in capsys.readouterr().err


def test_plan_of_a_config_and_of_a_directory(model_directory, capsys):
    assert main(["plan", "--config=configs/shared_moe_50m.py", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out).values()
    assert plan["parameters"] == 49_642_240
    assert plan["weight_bytes"]["bfloat16"] == 2 * 49_642_240
    assert main(["plan", f"--model={model_directory}"]) == 0
    assert "by_component" in capsys.readouterr().out
    assert main(["plan"]) == 2


def test_plan_of_a_reduction_is_a_table_with_a_row_for_each_stage(capsys):
    arguments = ["plan", "--config=configs/qwen3_30b_a3b_global.py", "--variant=lossless_start", "--device=rtx5090"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([*arguments, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert len(lines) < 20
    rows = {line.split("  ")[0]: line.split() for line in lines[1 : len(plans) + 1]}
    assert list(rows) == list(plans)
    assert rows["lossless_start recover_600"][2:] == [
        "600", "4,360,923,264", "3,341,707,392", "8.72", "GB", "8.82", "GB", "yes,", "26%", "291",
    ]  # fmt: skip
    assert rows["lossless_start original"][-3:-1] == ["no,", "178%"]
    assert "lossless_start original would fit with 68 of 128 experts per layer, or dtype=int8" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prun", "--help"], "unknown command 'prun': did you mean prune? (see moe-reduce --help)"),
        (["evalute"], "unknown command 'evalute': did you mean evaluate or evaluate-tasks? (see moe-reduce --help)"),
        (["xyz"], "unknown command 'xyz' (see moe-reduce --help)"),
    ],
)
def test_a_mistyped_command_offers_the_nearest_name(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"moe-reduce: {message}\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"moe-reduce \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_evaluate_equals_by_hand(model_directory, tiny_shared, tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, tiny_shared.vocab_size, (5, 16)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [
        "evaluate", f"--model={model_directory}", f"--data={tmp_path / 'tokens.npy'}", "--sequence-length=16",
        "--batch-size=4", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    assert main(arguments) == 0
    *_, measured_on, last = capsys.readouterr().out.splitlines()
    assert measured_on == f"measured on: all 75 targets of {tmp_path / 'tokens.npy'}"
    assert last == str(tmp_path / "out" / "summary.json")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    import moe_reduce

    logits = np.asarray(moe_reduce.load(model_directory)(tokens), np.float64)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_shares, tokens[:, 1:, None], -1).mean()
    assert found["tokens"] == 5 * 15
    asked = {"baseline": None, "tokenizer": None, "sequence_length": 16, "batch_size": 4, "max_batches": None}
    asked |= {"model": str(model_directory), "data": str(tmp_path / "tokens.npy"), "compute_dtype": "float32"}
    assert asked == {name: found[name] for name in asked}
    assert math.isclose(found["loss"], nll, rel_tol=1e-5)
    assert math.isclose(found["perplexity"], math.exp(nll), rel_tol=1e-4)
    assert math.isclose(found["accuracy"], (logits.argmax(-1) == tokens[:, 1:]).mean(), rel_tol=1e-5)
    assert main(arguments) == 2  # an existing --out is not overwritten
    assert main([*arguments, "--overwrite"]) == 0


def test_evaluate_says_which_text_it_measured():
    given = {"data": "python-stdlib", "sequence_length": 128, "max_batches": None}
    line = evaluate._measured_text(argparse.Namespace(**given), 5_000)
    assert line.startswith(
        "measured on: all of python-stdlib, 5,000 tokens in sequences of 128 (the validation loss of"
    )
    line = evaluate._measured_text(argparse.Namespace(**given | {"max_batches": 3}), 5_000)
    assert line.startswith("measured on: the first 3 batches of python-stdlib")


def _finished_run(directory, name, seed, loss):
    directory.mkdir(parents=True)
    summary = {
        "name": name, "parameters": 100 if name == "dense" else 40, "by_component": {}, "bytes": 4, "seed": seed,
        "train_flops_per_token": 2e6, "tokens": 1000, "steps": 10, "expert_use": None, "tokens_per_second": 5.0,
        "validation": {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5},
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "split": "validation", "loss": loss + 10 - step} for step in (5, 10)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_pairs_seeds_and_fills_documents(tmp_path, capsys):
    for seed, gap in ((0, 0.1), (1, 0.3)):
        _finished_run(tmp_path / f"s{seed}" / "shared", "shared", seed, 3.0 + seed + gap)
        _finished_run(tmp_path / f"s{seed}" / "dense", "dense", seed, 3.0 + seed)
    out = tmp_path / "results" / "pair"
    runs = [str(tmp_path / "s0"), str(tmp_path / "s1")]
    assert main(["report", "--runs", *runs, "--title=Pair", "--made-by=x", f"--out={out}"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    dense, shared = summary["rows"]
    assert dense[0] == "dense"
    assert shared[summary["columns"].index("gap")] == "+0.2000 ± 0.1000"
    assert shared[summary["columns"].index("of the first")] == "40.0%"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- results:pair -->\nold\n<!-- /results -->\nafter\n")
    fill = ["report", f"--document={document}", f"--results={tmp_path / 'results'}"]
    assert main([*fill, "--check"]) == 2
    assert "out of date" in capsys.readouterr().err
    assert main(fill) == 0
    assert "+0.2000 ± 0.1000" in document.read_text()
    assert "old" not in document.read_text()
    assert main([*fill, "--check"]) == 0


def _reduction(directory, name, seed, losses):
    """What `reduce` leaves of a reduction to half of 8 experts, with a recovery at the half."""
    directory.mkdir(parents=True)
    stages = [
        {
            "name": stage, "kind": kind, "experts": experts, "parameters": 100 * experts, "tokens": tokens,
            "validation": {"loss": loss, "accuracy": 1 / loss}, "expert_use": [[1 / experts] * experts],
        }
        for (stage, kind, experts, tokens), loss in zip(
            [("original", "", 8, 0), ("prune", "prune", 4, 0), ("recover", "tune", 4, 2_000_000)], losses, strict=True
        )
    ]  # fmt: skip
    content = {"name": name, "seed": seed, "stages": stages}
    (directory / "summary.json").write_text(json.dumps(content))


def test_report_of_reductions_takes_the_recovered_model_and_pairs_seeds(tmp_path, capsys):
    _reduction(tmp_path / "s0/pool", "pool", 0, (2.0, 4.0, 2.5))
    _reduction(tmp_path / "s1/pool", "pool", 1, (2.0, 5.0, 2.7))
    _reduction(tmp_path / "s0/layers", "layers", 0, (2.0, 3.0, 2.8))
    runs, made = [str(tmp_path / "s0"), str(tmp_path / "s1")], ["--title=Smaller", "--made-by=x"]
    assert main(["report", "--runs", *runs, *made, f"--out={tmp_path / 'both'}"]) == 0
    result = json.loads((tmp_path / "both/summary.json").read_text())
    assert result["columns"] == ["reduction", "training tokens", "seeds", "first model", "100 %", "50 %"]
    by_name = {row[0]: row[1:] for row in result["rows"]}
    assert by_name["parameters"] == ["", "", "", "800", "400"]
    kept = (1 / 2.5 + 1 / 2.7) / 2 / (1 / 2.0)
    assert by_name["pool"] == ["2.0 M", "2", "2.000 ± 0.000", "2.000 ± 0.000 (100.0%)", f"2.600 ± 0.100 ({kept:.1%})"]
    assert by_name["layers"][-1] == f"2.800 ({2.0 / 2.8:.1%})"
    assert (tmp_path / "both/curves.png").read_bytes().startswith(b"\x89PNG")
    # in the same order, whatever the order of the runs
    assert main(["report", "--runs", *reversed(runs), *made, f"--out={tmp_path / 'reversed'}"]) == 0
    assert json.loads((tmp_path / "reversed/summary.json").read_text())["rows"] == result["rows"]
    # an earlier result counts as its runs
    assert main(["report", "--runs", str(tmp_path / "both"), *made, f"--out={tmp_path / 'again'}"]) == 0
    assert json.loads((tmp_path / "again/summary.json").read_text())["rows"] == result["rows"]
    (tmp_path / "t/a").mkdir(parents=True)
    (tmp_path / "t/a/summary.json").write_text(json.dumps({"name": "a", "seed": 0}))
    capsys.readouterr()
    assert main(["report", "--runs", str(tmp_path / "t"), *runs, *made, f"--out={tmp_path / 'no'}"]) == 2
    assert "collect them separately" in capsys.readouterr().err


def _adaptation(directory, rate, seed, recalls, method="lora"):
    """What `adapt` leaves of ten learned pairs; recalls: at steps 5 and 10."""
    directory.mkdir(parents=True)
    summary = {
        "name": directory.name, "method": method, "adapter": {"method": method, "rank": 2, "sketch_width": 9},
        "learning_rate": rate, "seed": seed, "trained_parameters": 80, "trained_share": 0.02, "test": None,
        "measured": {"recall_train": recalls[-1], "recall_validation": 0.06},
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": 5 * n + 5, "split": "validation", "recall_train": value} for n, value in enumerate(recalls)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_of_adaptations_chooses_the_rate_on_what_all_rates_have(tmp_path, capsys):
    _adaptation(tmp_path / "s0/slow", 1e-3, 0, (0.2, 0.5))
    _adaptation(tmp_path / "s0/fast", 1e-2, 0, (0.4, 0.6))
    _adaptation(tmp_path / "s1/fast", 1e-2, 1, (0.1, 0.2))  # the mean of `fast` is under that of `slow`, on more seeds
    _adaptation(tmp_path / "s0/sketch", 1e-2, 0, (0.5, 0.9), "skema")
    made = ["--title=Learned", "--made-by=x"]
    for sources, out in ((("s0", "s1"), "first"), (("first",), "again")):
        runs = [str(tmp_path / source) for source in sources]
        assert main(["report", "--runs", *runs, *made, f"--out={tmp_path / out}"]) == 0
    results = [json.loads((tmp_path / out / "summary.json").read_text()) for out in ("first", "again")]
    assert results[0]["columns"][-3:] == ["step 5", "step 10", "other pairs"]
    by_method = {row[0]: row[3:] for row in results[0]["rows"]}
    assert by_method["lora"] == ["r = 2", "0.01 of 2", "2", "25.0% ± 15.0%", "40.0% ± 20.0%", "6.0% ± 0.0%"]
    assert by_method["skema"] == ["k = 9", "0.01 of 1", "1", "50.0%", "90.0%", "6.0%"]
    assert results[1]["rows"] == results[0]["rows"]
    assert results[0]["best"] == ["sketch", "fast"] or results[0]["best"] == ["fast", "sketch"]
    for name, recalls in (("longer", (0.1, 0.2, 0.3)), ("none", ())):
        _adaptation(tmp_path / name, 1e-2, 0, recalls or (0.1,))
        if not recalls:
            (tmp_path / name / "metrics.jsonl").unlink()
        capsys.readouterr()
        runs = [str(tmp_path / "s0"), str(tmp_path / name)]
        assert main(["report", "--runs", *runs, *made, f"--out={tmp_path / 'x'}"]) == 2
        assert name in capsys.readouterr().err


def test_runs_are_compared_with_the_baseline_whatever_the_alphabet_says():
    shared = {
        "by_component": {}, "bytes": 4, "train_flops_per_token": 2e6, "tokens": 9, "tokens_per_second": 5.0, "mfu": 0.1,
        "compile_seconds": 1.0, "expert_use": None, "trained_parameters": 8, "trained_share": 0.1, "test": None,
        "optimizer_bytes": 64, "learning_rate": 0.1, "measured": {},
    }  # fmt: skip
    small, dense = (
        shared | {"name": name, "parameters": size, "validation": {"loss": loss, "perplexity": 9.0, "accuracy": 0.5}}
        for name, size, loss in (("branched", 50, 2.5), ("dense", 100, 2.0))
    )
    rows = [line.split() for line in training_table.table([small, dense]).splitlines()]
    assert ["gap", "to", "dense", "+0.5000", "+0.0000"] in rows
    assert ["share", "of", "dense", "50.0%", "100.0%"] in rows
    assert ["gap", "to", "branched", "+0.0000"] in [x.split() for x in training_table.table([small]).splitlines()]
    lora, full = small | {"name": "a", "method": "lora"}, dense | {"name": "b", "method": "full"}
    times = adaptation_table.table([lora | {"tokens_per_second": 10.0}, full]).splitlines()[-1]
    assert times.split() == ["time", "of", "a", "step,", "b", "=", "1", "0.50", "1.00"]


def test_report_adds_seeds_to_an_earlier_result(tmp_path):
    for seed in (0, 1):
        _finished_run(tmp_path / f"s{seed}" / "dense", "dense", seed, 3.0 + seed)
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    made = ["--title=Pair", "--made-by=x"]
    assert main(["report", "--runs", str(tmp_path / "s0"), *made, f"--out={first}"]) == 0
    assert main(["report", "--runs", str(first), str(tmp_path / "s1"), *made, f"--out={second}"]) == 0
    assert main(["report", "--runs", str(tmp_path / "s0"), str(tmp_path / "s1"), *made, f"--out={both}"]) == 0
    for file in ("summary.json", "curves.jsonl"):
        assert (second / file).read_text() == (both / file).read_text()
    _finished_run(tmp_path / "again", "dense", 0, 2.0)
    again = tmp_path / "replaced"
    assert main(["report", "--runs", str(second), str(tmp_path / "again"), *made, f"--out={again}"]) == 0
    assert json.loads((again / "summary.json").read_text())["rows"][0][6] == "3.0000 ± 1.0000"  # of 2 and 4


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["evaluate", "--model=x", "--data=x", "--batch-size=0"], "--batch-size must be positive"),
        (["evaluate", "--model=x", "--data=x", "--max-batches=-1"], "--max-batches must be positive"),
        (["train", "--config=configs/quickstart_models.py", "--workdir=gs://bucket/run"], "--workdir="),
        (["report"], "--runs"),
        *(
            (["evaluate", "--model=x", "--tasks=a", f"{option}=9"], f"{option} does nothing with --tasks")
            for option in ("--tokenizer", "--max-batches", "--sequence-length", "--cache")
        ),
        *(
            (["evaluate", "--model=x", "--data=x", f"{option}=9"], f"{option} does nothing without --tasks")
            for option in ("--limit", "--few-shot", "--task-path")
        ),
        (["merge", "--model=x", "--adapter=x", "--out=x", "--compute-dtype=float32"], "--compute-dtype"),
        *(
            (
                ["plan", "--config=configs/quickstart_models.py", "--topology=h100:1", option],
                f"{option.split('=')[0]} does nothing with --topology",
            )
            for option in ("--device=h100", "--context=9", "--batch=9", "--dtype=int8", "--cache-dtype=int8")
        ),
        (["plan", "--config=configs/quickstart_models.py", "--stage=x"], "--stage does nothing without --topology"),
        (["plan", "--model=x", "--variant=x"], "--variant does nothing with --model"),
        (["plan", "--config=configs/quickstart_models.py", "--context=0"], "--context"),
        (["inspect", "--model=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, culprit, tmp_path, capsys):
    if arguments[0] == "evaluate":
        arguments = [*arguments, f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert culprit in line


def test_a_place_for_results_is_checked_before_they_are_made(model_directory, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", np.zeros((4, 16), np.int32))
    (tmp_path / "file").write_text("mine")
    data = [f"--data={tmp_path / 'tokens.npy'}", "--sequence-length=16"]
    evaluate = ["evaluate", f"--model={model_directory}", *data, "--overwrite"]
    monitor = ["monitor", f"--model={model_directory}", "--overwrite"]
    report = ["report", "--runs", str(tmp_path / "run"), "--title=T", "--made-by=me", "--overwrite"]
    for arguments in (evaluate, monitor, report):
        for out in (tmp_path / "file", model_directory, tmp_path / "file/below"):
            before = sorted(path.name for path in model_directory.iterdir())
            capsys.readouterr()
            assert main([*arguments, f"--out={out}"]) == 2
            captured = capsys.readouterr()
            (line,) = captured.err.splitlines()
            assert str(out) in line
            assert captured.out == ""
            assert sorted(path.name for path in model_directory.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_figures_of_evaluate_are_no_run(tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/summary.json").write_text('{"loss": 1.0}')
    made = ["--title=T", "--made-by=me", f"--out={tmp_path / 'out'}"]
    assert main(["report", "--runs", str(tmp_path / "figures"), *made]) == 2
    assert "was not written by train, reduce or adapt" in capsys.readouterr().err


DAMAGED = {
    "manifest": ("manifest.json", '{"files": [], "chain": []}', ["inspect", "--verify"], "files must be an object"),
    "layers": ("config.json", {"layer_types": 3}, ["inspect"], "layer_types=3"),
    "weights": ("model.safetensors", None, ["inspect"], "model.safetensors is not a file"),
    "prompt": (None, None, ["generate", "--prompt=\udcff"], "--prompt='\\udcff' is not UTF-8"),
    "dense": (None, None, ["pool"], "a dense model has no experts"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_directory_is_one_line(case, tiny_dense, tmp_path, capsys):
    params = jax.tree.map(np.asarray, init_params(tiny_dense, jax.random.key(0)))
    directory = tmp_path / "model"
    save(Model(tiny_dense, params, ExecutionConfig().resolve("cpu")), directory)
    file, content, (command, *more), culprit = DAMAGED[case]
    if isinstance(content, dict):
        content = json.dumps(json.loads((directory / file).read_text()) | content)
    if file is not None:
        (directory / file).unlink()
        if content is None:
            (directory / file).mkdir()
        else:
            (directory / file).write_text(content)
    out = [f"--out={tmp_path / 'out'}"] if command == "pool" else []
    assert main([command, f"--model={directory}", *more, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert culprit in line
