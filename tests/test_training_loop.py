"""What a run leaves behind, that it learns, and how it stops when it cannot go on."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import (
    corpus_data,
    losses,
    metrics,
    run_config,
    step_function,
    token_data,
    unmeasured_peak,
    write_config,
)

from moe_reduce.__main__ import main
from moe_reduce.core.errors import UserError
from moe_reduce.runs import train as run_train
from moe_reduce.runs.train import train
from moe_reduce.storage.model_directory import load
from moe_reduce.training import job, optimizer, sharding
from moe_reduce.training.checkpoints import Checkpoints
from moe_reduce.training.losses import language_model_task
from moe_reduce.training.metrics import TIMING, read_metrics
from moe_reduce.training.validation import Mean


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, corpus, token_cache):
    """The arguments and the workdir of 60 steps of the shared mixture on text, by the command."""
    directory = tmp_path_factory.mktemp("learned")
    changes = {"steps": 60, "learning_rate": 3e-2, "log_every": 10, "evaluate_every": 30, "checkpoint_every": 50}
    file = write_config(directory, corpus_data(corpus, token_cache), train=changes)
    arguments = ["train", f"--config={file}", f"--workdir={directory / 'run'}", "--config.train.warmup_steps=5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        assert main(arguments) == 0
    return arguments, directory / "run"


def test_training_learns(learned):
    _, workdir = learned
    first, *_, last = losses(workdir)
    at_random = math.log(384)
    assert first < at_random
    assert last < at_random - 1.5
    validation = metrics(workdir, "validation")
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert validation[-1]["loss"] == pytest.approx(last, abs=0.5)
    assert validation[-1]["perplexity"] == pytest.approx(math.exp(validation[-1]["loss"]))


def test_metrics_have_all_fields(learned):
    _, workdir = learned
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        *[(step, "train") for step in (10, 20, 30)], (30, "validation"),
        *[(step, "train") for step in (40, 50, 60)], (60, "validation"),
    ]  # fmt: skip
    routed = {
        "balance_pooled", "balance_per_call", "router_z", "dropped_share", "expert_entropy", "dead_expert_share",
    }  # fmt: skip
    for line in metrics(workdir):
        assert (
            set(line) == {"step", "split", "loss", "learning_rate", "gradient_norm", "parameter_norm", *TIMING} | routed
        )
        assert line["tokens_per_second"] > 0
        assert line["mfu"] > 0
        assert line["dropped_share"] == 0
    assert {"loss", "perplexity", "accuracy"} <= set(metrics(workdir, "validation")[0])


def test_summary_and_pictures(learned):
    _, workdir = learned
    summary = json.loads((workdir / "summary.json").read_text())
    assert None not in summary.values()
    assert summary["parameters"] == sum(summary["by_component"].values())
    assert (summary["steps"], summary["tokens"]) == (60, 60 * 8 * 32)
    assert summary["validation"]["loss"] == metrics(workdir, "validation")[-1]["loss"]
    assert np.shape(summary["expert_use"]) == (2, 4)
    np.testing.assert_allclose(np.sum(summary["expert_use"], axis=1), 1, atol=1e-5)
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    (events,) = (workdir / "tensorboard").glob("events.out.tfevents.*")
    assert events.stat().st_size > 1000


def test_result_is_a_model_with_its_tokenizer(learned):
    _, workdir = learned
    logits_BTV = load(workdir / "model")(np.zeros((1, 4), np.int32))
    assert logits_BTV.shape == (1, 4, 384)
    assert (workdir / "model/tokenizer.json").is_file()
    (step,) = load(workdir / "model").chain
    assert step.command == "train"


def contents(workdir):
    return {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}


def test_finished_run_says_so_and_changes_nothing(learned, capsys):
    arguments, workdir = learned
    before = contents(workdir)
    assert main(arguments) == 0
    output = capsys.readouterr().out.splitlines()
    assert "is done: nothing to do" in output[0]
    assert output[-1] == str(workdir / "summary.json")
    assert contents(workdir) == before


def test_another_configuration_is_refused_by_key(learned, capsys):
    arguments, workdir = learned
    before = contents(workdir)
    assert main([*arguments, "--config.train.learning_rate=0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.learning_rate is 0.03 there and 0.5 here" in line
    assert contents(workdir) == before


def explode_at_step_9(patch, rate):
    """The update of step 9 ruins the parameters; the loss of that step is still good."""
    good = optimizer.learning_rate
    patch.setattr(
        optimizer,
        "learning_rate",
        lambda config: optax.join_schedules([good(config), optax.constant_schedule(rate)], [8]),
    )


@pytest.mark.parametrize(
    ("rate", "checkpoint_every", "message", "kept"),
    [
        (1e30, 3, r"parameter_norm is inf at step 9, batch 8 .* last good checkpoint is of step 6", ["3", "6"]),
        (1e15, 3, r"validation loss is nan after step 9, batch 8 .* of step 6", ["3", "6"]),
        (1e15, 20, r" is nan at step 10, batch 9 .* no checkpoint was due yet", []),
    ],
)
def test_divergence_names_step_and_batch_and_keeps_what_is_good(tmp_path, rate, checkpoint_every, message, kept):
    run = run_config("dense", token_data(tmp_path), steps=12, checkpoint_every=checkpoint_every)
    with pytest.MonkeyPatch.context() as patch:
        explode_at_step_9(patch, rate)
        with pytest.raises(UserError, match=message):
            train(run, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == kept
    assert not (tmp_path / "run/summary.json").exists()
    assert np.isfinite(losses(tmp_path / "run")).all()
    if rate == 1e30:
        train(run, tmp_path / "run")
        assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))
        assert metrics(tmp_path / "run", "validation")[-1]["loss"] < math.log(384)


def test_the_loop_transfers_nothing_by_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "put_batch", lambda _, batch: batch)
    data = token_data(tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"Disallowed host-to-device transfer"):
        train(run_config("dense", data, steps=3), tmp_path / "run")


def test_a_metric_that_a_task_adds_reaches_the_log_and_the_summary(monkeypatch, tmp_path):
    """Divided by a weight of its own: the share of even targets among those above 100."""

    def with_metric(*arguments):
        task = language_model_task(*arguments)

        def evaluate(params, batch):
            high = batch["weights"] * (batch["targets"] > 100).astype(jnp.float32)
            even = high * (batch["targets"] % 2 == 0).astype(jnp.float32)
            return task.evaluate(params, batch) | {"even_share": Mean(jnp.sum(even), jnp.sum(high))}

        return dataclasses.replace(task, evaluate=evaluate)

    monkeypatch.setattr(run_train, "language_model_task", with_metric)
    run = run_config("dense", token_data(tmp_path), steps=3)
    summary = train(run, tmp_path / "run")
    tokens = np.load(run.data.source)[-16:, 1:]  # validation_fraction is a quarter of 64 rows
    expected = np.mean(tokens[tokens > 100] % 2 == 0)
    assert 0.3 < expected < 0.7
    assert set(summary["validation"]) == {"loss", "perplexity", "accuracy", "even_share"}
    assert summary["validation"]["even_share"] == pytest.approx(expected, rel=1e-6)
    assert json.loads((tmp_path / "run/summary.json").read_text())["validation"] == summary["validation"]
    assert metrics(tmp_path / "run", "validation")[-1]["even_share"] == summary["validation"]["even_share"]


def test_a_save_holds_no_buffer_that_the_next_step_overwrites(monkeypatch, tmp_path):
    _, state = step_function(run_config("dense", token_data(tmp_path)))
    checkpoints = Checkpoints(tmp_path / "checkpoints", run_config("dense", token_data(tmp_path)).train)
    saved = []
    monkeypatch.setattr(checkpoints._manager, "save", lambda _, args: saved.append(args.state.item))
    checkpoints.save(1, state, {})
    checkpoints.close()
    pointers = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)} for tree in (state, saved[0])]
    assert len(pointers[1]) == len(jax.tree.leaves(state))
    assert not pointers[0] & pointers[1]


def test_half_a_line_of_metrics_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ["{}", '{"step": 1.0}', '{"step": true}', '{"step": 1, "split": 2}'])
def test_damaged_lines_of_metrics_are_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    for damaged in (line, '{"step": 1, "split": "train", "loss": "x"}'):
        file.write_text(f'{{"step": 1, "split": "train", "loss": 2.5}}\n{damaged}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:2 has no"):
            read_metrics(file)


def test_a_run_killed_before_its_result_was_written_only_writes_it(tmp_path):
    run = run_config("dense", token_data(tmp_path), steps=4)
    expected = train(run, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/model")
    summary = train(run, tmp_path / "run")
    assert summary["validation"] == expected["validation"]
    assert summary["tokens_per_second"] is None
    assert (tmp_path / "run/model/model.safetensors").is_file()
