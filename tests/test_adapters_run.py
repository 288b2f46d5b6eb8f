"""adapt and merge through the real command line: what is left, what resumes, and what is refused."""

import dataclasses
import json
import math
import re
import resource
import shutil

import jax
import numpy as np
import pytest
from training_runs import MODELS, assert_close, token_data, unmeasured_peak

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.adapters import adapter_directory
from moe_reduce.core import trees
from moe_reduce.core.config import DataConfig, ExecutionConfig, TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.completions import uuid_pairs
from moe_reduce.data.prepare import prepare
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.runs import equivalence
from moe_reduce.storage.manifest import input_of, verify
from moe_reduce.training import job
from moe_reduce.training.checkpoints import Checkpoints
from moe_reduce.training.metrics import read_metrics

CONFIG = """
from moe_reduce.core import config as defaults


def get_config():
    config = defaults.adapt_base()
    config.model = {model!r}
    config.mesh.data = 1
    config.adapter.update(method="skema", targets="q,v,mlp", sketch_width=4, layers="top:1")
    config.data.update(source={source!r}, sequence_length=32, validation_fraction=0.25)
    config.execution.block_rows = 8
    config.train.update(
        steps=20, batch_size=8, learning_rate=3e-2, log_every=1, evaluate_every=10, checkpoint_every=2,
        evaluate_batches=2,
    )
    return config
"""


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


def write(directory, kind="dense"):
    config = dataclasses.replace(MODELS[kind], init_std=0.3)
    params = init_params(config, jax.random.key(0))
    moe_reduce.save(Model(config, params, ExecutionConfig()), directory / "base", overwrite=True)
    data = token_data(directory)
    file = directory / "config.py"
    file.write_text(CONFIG.format(model=str(directory / "base"), source=data.source))
    return file


def _adapt(file, workdir, *more):
    return main(["adapt", f"--config={file}", f"--workdir={workdir}", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        assert _adapt(write(directory), directory / "run") == 0
    return directory


def test_what_a_run_leaves(finished):
    work = finished / "run"
    summary = json.loads((work / "summary.json").read_text())
    assert summary["trained_parameters"] == 5 * 16
    assert summary["optimizer_bytes"] == 8 * 80
    assert {line["mfu"] for line in read_metrics(work / "metrics.jsonl") if line["split"] == "train"} == {None}
    assert (summary["mfu"], summary["train_flops_per_token"]) == (None, None)
    base, merged = moe_reduce.load(finished / "base"), moe_reduce.load(work / "model")
    old, new = trees.flatten(base.params), trees.flatten(merged.params)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {f"layers/attention/{n}" for n in ("query", "value")} | {
        f"layers/mlp/{n}" for n in ("gate", "up", "down")
    }
    for path in changed:
        assert np.array_equal(old[path][0], new[path][0]), "only the top layer is adapted"
    assert verify(work / "model") == []
    assert [step.command for step in merged.chain] == ["merge", "adapt"]
    report = json.loads((work / equivalence.EQUIVALENCE).read_text())
    assert report["equivalent"]
    assert 0 < report["largest_logit_difference"] < 1e-4 * report["largest_logit"]
    assert report["perplexity"]["merged"] == pytest.approx(report["perplexity"]["active"], rel=1e-5)
    assert report["perplexity"]["merged"] < 0.999 * report["perplexity"]["base"]
    sizes, needed = report["parameter_bytes"], report["peak_memory_bytes"]
    assert sizes["merged"] == sizes["base"] == 4 * summary["parameters"]
    assert sizes["active"] > sizes["merged"], "the adapter lies beside the base"
    assert all(needed[name] > sizes[name] for name in ("base", "active", "merged"))
    log = json.loads((work / equivalence.MERGE_LOG).read_text())
    assert set(log["merged"]) == {"model.safetensors"}
    assert (work / "loss.png").is_file()


@pytest.mark.parametrize("limit", [300, 1500, 4000, 20_000])  # bytes a file: too few for ever more of the result
def test_a_full_disk_at_the_end_is_one_line_and_the_next_attempt_goes_on(finished, tmp_path, capsys, limit):
    work = tmp_path / "run"
    shutil.copytree(finished / "run", work)
    expected = (work / "model/model.safetensors").read_bytes()
    shutil.rmtree(work / "model")
    shutil.rmtree(work / "adapter")
    (work / "summary.json").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert _adapt(finished / "config.py", work) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert "File too large" in line
    assert str(work) in line
    assert "free some space" in line
    assert _adapt(finished / "config.py", work) == 0
    assert (work / "model/model.safetensors").read_bytes() == expected


def test_merging_again_gives_the_same_log(finished, tmp_path):
    arguments = ["merge", f"--model={finished / 'base'}", f"--adapter={finished / 'run/adapter'}"]
    logs = []
    for name in ("one", "other"):
        assert main([*arguments, f"--out={tmp_path / name}"]) == 0
        logs.append(json.loads((tmp_path / name / equivalence.MERGE_LOG).read_text()))
        assert logs[-1].pop("date")
    assert logs[0] == logs[1]
    reports = [json.loads((tmp_path / name / equivalence.EQUIVALENCE).read_text()) for name in ("one", "other")]
    assert reports[0]["latency_seconds"] != reports[1]["latency_seconds"]
    assert input_of(tmp_path / "one").sha256 == input_of(tmp_path / "other").sha256
    assert main([*arguments, f"--out={tmp_path / 'one'}", "--overwrite"]) == 0


def test_merge_gives_what_adapt_gave(finished, tmp_path, capsys):
    arguments = [f"--model={finished / 'base'}", f"--adapter={finished / 'run/adapter'}"]
    assert main(["merge", *arguments, f"--out={tmp_path / 'merged'}"]) == 0
    assert "largest_logit_difference" in capsys.readouterr().out
    again, once = moe_reduce.load(tmp_path / "merged"), moe_reduce.load(finished / "run/model")
    assert_close(again.params, once.params)
    assert [entry.path for entry in again.chain[-1].inputs] == [str(finished / "base"), str(finished / "run/adapter")]
    assert verify(tmp_path / "merged") == []
    assert (tmp_path / "merged" / equivalence.EQUIVALENCE).is_file()

    def refused(part, *more):
        assert main(["merge", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line

    refused("exists", *arguments, f"--out={tmp_path / 'merged'}")
    twice = [f"--model={tmp_path / 'merged'}", arguments[1], f"--out={tmp_path / 'twice'}"]
    refused("is another model", *twice)
    refused("is not a directory", arguments[0], f"--adapter={tmp_path / 'none'}", f"--out={tmp_path / 'x'}")
    refused("has no adapter_config.json", arguments[0], f"--adapter={tmp_path}", f"--out={tmp_path / 'x'}")
    assert not (tmp_path / "twice").exists()


def test_inspect_says_which_inputs_are_what_they_were(finished, tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(finished / "base", base)
    shutil.copytree(finished / "run/adapter", adapter)
    assert main(["merge", f"--model={base}", f"--adapter={adapter}", f"--out={tmp_path / 'merged'}"]) == 0

    def states(*more):
        capsys.readouterr()
        assert main(["inspect", f"--model={tmp_path / 'merged'}", *more]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("merge: ")]
        return line.partition("from ")[2]

    assert states() == f"{base}, {adapter}"
    assert states("--verify") == f"{base} (unchanged), {adapter} (unchanged)"
    (adapter / "adapter.safetensors").write_bytes((adapter / "adapter.safetensors").read_bytes() + b"x")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes() + b"x")
    assert states("--verify") == f"{base} (changed since), {adapter} (changed since)"
    shutil.rmtree(base)
    (adapter / "adapter.safetensors").unlink()
    assert states("--verify") == f"{base} (not found), {adapter} (changed since)"
    (adapter / "adapter.json").unlink()
    assert states("--verify") == f"{base} (not found), {adapter} (cannot be checked)"


def test_inspect_finds_relative_inputs_wherever_it_runs(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    shutil.copytree(finished / "run/adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "--model=base", "--adapter=adapter", "--out=deep/merged"]) == 0
    for place in (tmp_path, tmp_path / "deep", finished):
        monkeypatch.chdir(place)
        capsys.readouterr()
        assert main(["inspect", f"--model={tmp_path / 'deep/merged'}", "--verify"]) == 0
        assert "from base (unchanged), adapter (unchanged)" in capsys.readouterr().out


def test_a_report_that_fails_stops_the_merge(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(equivalence, "TOLERANCES", {"float32": 0.0})
    arguments = [f"--model={finished / 'base'}", f"--adapter={finished / 'run/adapter'}", f"--out={tmp_path / 'out'}"]
    assert main(["merge", *arguments]) == 2
    assert "is not the adapted one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resumed_is_uninterrupted(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "run", tmp_path / "run")
    for name in ("model", "adapter", "checkpoints/20"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run/summary.json").unlink()
    restored = []
    once = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, step, wanted: (restored.append(step), once(self, step, wanted))[1]
    )
    assert _adapt(finished / "config.py", tmp_path / "run") == 0
    assert restored == [18]
    config = moe_reduce.load(finished / "base").config
    left, right = (adapter_directory.load(place / "run/adapter", config, None) for place in (finished, tmp_path))
    assert_close(left.tree, right.tree)


def test_a_bf16_base_and_a_bf16_computation_are_reported(finished, tmp_path):
    """Rounding is measured, stated and never loses a run."""
    more = ["--config.dtype=bfloat16", "--config.execution.compute_dtype=bfloat16"]
    assert _adapt(finished / "config.py", tmp_path / "run", *more) == 0
    report = json.loads((tmp_path / "run" / equivalence.EQUIVALENCE).read_text())
    assert report["dtype"] == "bfloat16"
    assert report["equivalent"]
    assert report["largest_logit_difference"] > 1e-4 * report["largest_logit"], "bf16 rounds what fp32 did not"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "layer"])
def test_eight_devices_adapt_as_one_does(tmp_path, kind):
    file = write(tmp_path, kind)
    losses = []
    for name, mesh in (("one", ()), ("eight", ("data=2", "fsdp=2", "expert=2" if kind == "layer" else "tensor=2"))):
        overrides = [f"--config.mesh.{axis}" for axis in mesh]
        assert _adapt(file, tmp_path / name, *overrides, "--config.train.steps=3") == 0
        losses.append(json.loads((tmp_path / name / "summary.json").read_text())["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_whole_model_trains_without_an_adapter(finished, tmp_path):
    file = tmp_path / "config.py"
    text = (finished / "config.py").read_text()
    file.write_text(text.replace("    return config\n", "    config.adapter = None\n    return config\n"))
    assert _adapt(file, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["trained_parameters"] == summary["parameters"]
    assert not (tmp_path / "run/adapter").exists()


def test_another_text_is_measured_at_the_end(finished, tmp_path, capsys):
    source = re.search(r"source='(.*?)'", (finished / "config.py").read_text())[1]
    more = [f"--config.test_source={source}", "--config.train.steps=2"]
    assert _adapt(finished / "config.py", tmp_path / "run", *more) == 0
    found = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    arguments = [f"--model={tmp_path / 'run/model'}", f"--data={source}", "--sequence-length=32", "--batch-size=8"]
    assert main(["evaluate", *arguments, f"--out={tmp_path / 'evaluated'}"]) == 0
    evaluated = json.loads((tmp_path / "evaluated/summary.json").read_text())
    assert found["tokens"] == evaluated["tokens"]
    assert found["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)
    for value, part in (("nowhere.npy", "nowhere.npy"), ("", "test_source is empty")):
        assert _adapt(finished / "config.py", tmp_path / "refused", f"--config.test_source={value}") == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "refused/checkpoints").exists()


def test_epochs_decide_the_steps(finished, tmp_path, capsys):
    more = ["--config.train.steps=0", "--config.train.epochs=0.01", "--config.adapter.layers=top:1"]
    assert _adapt(finished / "config.py", tmp_path / "run", *more) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (source,) = re.findall(r"source='([^']+)'", (finished / "config.py").read_text())
    sequences = prepare(DataConfig(source=source, sequence_length=32, validation_fraction=0.25), 384)[0].rows(
        "train", 32
    )
    assert summary["steps"] == math.ceil(0.01 * sequences / 8)
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["epochs"] == 0.01
    assert _adapt(finished / "config.py", tmp_path / "run", *more) == 0
    assert "is done" in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 13), (0.5, 7), (3.0, 38)])
def test_epochs_round_up_to_steps(epochs, steps):
    schedule = TrainConfig(epochs=epochs, batch_size=8, warmup_steps=2)
    schedule.check()
    assert schedule.over(100) == TrainConfig(steps=steps, batch_size=8, warmup_steps=2)
    with pytest.raises(UserError, match=r"train\.warmup_steps \(2\) must be below train\.epochs"):
        schedule.over(4)


def test_a_budget_decides_the_size(finished, tmp_path, capsys):
    more = ["--config.budget=0.02", "--config.train.steps=1"]
    text = (finished / "config.py").read_text().replace("sketch_width=4, ", "")
    (tmp_path / "config.py").write_text(text)
    assert _adapt(tmp_path / "config.py", tmp_path / "run", *more) == 0
    total = json.loads((tmp_path / "run/summary.json").read_text())
    width = int((0.02 * total["parameters"] / 5) ** 0.5)
    assert total["trained_parameters"] == 5 * width**2
    assert f"sketch_width={width}" in capsys.readouterr().out


def test_uuids_are_memorised(tmp_path, capsys):
    """Random values: pairs that are learned come back, and others do not."""
    config = dataclasses.replace(MODELS["dense"], vocab_size=512)
    from moe_reduce.data.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer([f"{key}{value}" for key, value in uuid_pairs("400")], 300)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    params = init_params(config, jax.random.key(0))
    model = Model(config, params, ExecutionConfig(), source=tmp_path / "tokenizer")
    moe_reduce.save(model, tmp_path / "base")
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(model=str(tmp_path / "base"), source="uuid-pairs:4"))
    more = ["--config.data.sequence_length=80", "--config.train.batch_size=2", "--config.train.evaluate_every=200"]
    text = file.read_text().replace("    return config\n", "    config.adapter = None\n    return config\n")
    file.write_text(text.replace("validation_fraction=0.25", "validation_fraction=0.5"))
    assert _adapt(file, tmp_path / "run", *more, "--config.train.steps=200", "--config.train.checkpoint_every=200") == 0
    measured = json.loads((tmp_path / "run/summary.json").read_text())["measured"]
    assert measured["recall_train"] > 0.9
    assert measured["recall_validation"] < 0.5
    assert measured["exact_match_train"] > 0.4
    assert measured["exact_match_validation"] == 0
    shown = capsys.readouterr().out
    assert "recall_train" in shown
    assert "exact_match_train" in shown
    short = ["--config.train.steps=1", "--config.mesh.data=2", "--config.recall_pairs=1"]
    assert _adapt(file, tmp_path / "mesh", *more, *short) == 0
    for source, part in (("uuid-pairs:many", "give a number of pairs"), ("uuid-pairs:4", "set data.sequence_length=")):
        length = "--config.data.sequence_length=8"
        assert _adapt(file, tmp_path / "refused", f"--config.data.source={source}", *more[1:], length) == 2
        assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("--config.model=", "model is empty"),
        ("--config.model=nowhere", "nowhere is not a directory"),
        ("--config.adapter.targets=q,gat", "the model has no 'gat'"),
        ("--config.adapter.sketch_width=40", "exceeds"),
        ("--config.adapter.method=lora", "adapter.sketch_width is not for lora"),
        ("--config.adapter.method=skme", "adapter.method must be one of"),
        ("--config.budget=0.1", "budget decides adapter.sketch_width"),
        ("--config.base_sha256=0123", "is another one than base_sha256 says"),
        ("--config.mesh.expert=2", "needs experts"),
        ("--config.budget=-1.0", "budget must be positive"),
        ("--config.data.completion_field=answer", "holds token ids"),
        ("--config.train.steps=0", "train.steps must be positive"),
        ("--config.train.epochs=2", "train.steps (20) and train.epochs (2.0) both say how long to train"),
        ("--config.balance.bias_rate=0.1", "balance.bias_rate is for train"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, override, part):
    assert _adapt(write(tmp_path), tmp_path / "run", override) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moe-reduce adapt: ")
    assert part in line
