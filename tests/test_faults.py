"""What users get wrong, through the real command line: status 2, one line that names the culprit, nothing left over."""

import argparse
import dataclasses
import errno
import importlib
import json
import shutil
import subprocess

import numpy as np
import pytest
from training_runs import command, corpus_data, environment, run_config, token_data, unmeasured_peak, write_config

from moe_reduce import __main__
from moe_reduce.__main__ import main
from moe_reduce.commands import config_file
from moe_reduce.core.config import DataConfig, in_order, parse, reduce_base, reduce_from_dict, stage, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.runs import train as run_module
from moe_reduce.runs import workdir
from moe_reduce.runs.workdir import claim
from moe_reduce.storage.manifest import read_chain
from moe_reduce.training import job
from moe_reduce.training.checkpoints import Checkpoints

CHEAP = {"execution": {"dispatch": "reference"}}  # to compile


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(arguments of train, parts of the line) checks status and stderr; --config and --workdir are filled in."""
    file = write_config(tmp_path, token_data(tmp_path), **CHEAP)

    def check(arguments, *parts, workdir=tmp_path / "run", file=file):
        assert main(["train", f"--config={file}", f"--workdir={workdir}", *arguments]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("moe-reduce train: ")
        for part in parts:
            assert part in line
        assert "Traceback" not in captured.out + captured.err

    return check


@pytest.fixture
def free(tmp_path):
    """free(): the corrected configuration may start in the same workdir."""

    def check():
        (good,) = config_file.read(str(tmp_path / "config.py"), []).values()
        assert not (tmp_path / "run/checkpoints").exists()
        claim(tmp_path / "run", good)

    return check


KEYS = {
    "typo in an override": (["--config.train.stps=3"], "config.train.stps"),
    "wrong type": (["--config.train.steps=abc"], "config.train.steps", "abc"),
    "a fraction of a step": (["--config.train.steps=1.5"], "config.train.steps"),
    "no steps": (["--config.train.steps=0"], "train.steps must be positive"),
    "negative width": (["--config.model.width=-16"], "model.width must be positive, got -16"),
    "zero layers": (["--config.model.layers=0"], "model.layers must be positive"),
    "heads": (["--config.model.query_heads=3"], "model.query_heads (3)", "model.key_value_heads (2)"),
    "odd head width": (["--config.model.head_width=5"], "model.head_width must be even", "5"),
    "more active than there are": (["--config.model.moe.active=5"], "model.moe.active (5)", "model.moe.experts (4)"),
    "one router for many pools": (["--config.model.moe.placement=layer"], "model.moe.router=shared"),
    "unknown choice": (["--config.model.moe.router=both"], "model.moe.router", "layer, shared", "both"),
    "dense and experts": (["--config.model.feed_forward_width=32"], "model.feed_forward_width", "model.moe"),
    "factorised but not tied": (["--config.model.tied_embeddings=False"], "model.embedding_factor"),
    "mesh too large": (["--config.mesh.data=16"], "needs 16 devices", "there are 8", "mesh."),
    "mesh of nothing": (["--config.mesh.tensor=0"], "mesh.tensor must be positive"),
    "experts on a mesh": (["--config.mesh.expert=3"], "model.moe.experts (4)", "mesh.expert (3)"),
    "vocabulary on a mesh": (["--config.mesh.tensor=2", "--config.model.vocab_size=385"], "embedding/factor", "385"),
    "batch on a mesh": (["--config.mesh.data=3"], "train.batch_size (8)", "mesh.data"),
    "batch in parts": (["--config.train.accumulation=3"], "train.batch_size (8)", "train.accumulation (3)"),
    "warm-up to the end": (["--config.train.warmup_steps=20"], "train.warmup_steps (20)", "train.steps (20)"),
    "rate that is no number": (["--config.train.learning_rate=nan"], "train.learning_rate must be a finite number"),
    "rate that rises": (
        ["--config.train.learning_rate=1e-4"],
        "train.final_learning_rate (0.001)",
        "train.learning_rate (0.0001)",
    ),
    "endless clipping": (["--config.train.clip_norm=inf"], "train.clip_norm must be a finite number"),
    "bias that is not there": (["--config.balance.bias_rate=0.1"], "balance.bias_rate", "model.moe.selection_bias"),
    "average": (["--config.train.ema_decay=1.0"], "train.ema_decay"),
    "unknown variant": (["--variant=huge"], "--variant=huge", "unknown"),
    "unknown argument": (["--wrkdir=x"], "--wrkdir=x"),
    "no value": (["--config.train.steps"], "config.train.steps"),
    "half of the processes": (["--coordinator=127.0.0.1:1"], "--coordinator", "--processes"),
    "no port": (["--coordinator=here", "--processes=2", "--process=0"], "--coordinator=here", "HOST:PORT"),
    "fewer than no documents": (["--config.data.max_documents=-1"], "data.max_documents must be positive, got -1"),
    "attention of GPUs": (["--config.execution.attention=cudnn"], "execution.attention=cudnn is for GPUs"),
    "attention of TPUs": (["--config.execution.attention=splash"], "execution.attention=splash", "jax sees cpu"),
    "experts of GPUs": (["--config.execution.dispatch=grouped"], "execution.dispatch=grouped", "jax sees cpu"),
    "nothing matches": (["--config.data.source=/nowhere/*.txt"], "/nowhere/*.txt"),
    "no such file": (["--config.data.source=/nowhere.npy"], "/nowhere.npy"),
    "no such tokenizer": (["--config.data.source=python-stdlib", "--config.data.tokenizer=/nowhere"], "/nowhere"),
    "other sequences": (["--config.data.sequence_length=16"], "sequences of 32", "data.sequence_length"),
    "too few for a batch": (["--config.train.batch_size=64"], "train.batch_size=64", "48"),
    "nothing to validate on": (["--config.data.validation_fraction=0.0"], "data.validation_fraction"),
    "ids beyond the vocabulary": (["--config.model.vocab_size=300"], "tokens.npy", "model.vocab_size is 300"),
    "it diverges": (
        ["--config.train.learning_rate=1e30", "--config.train.warmup_steps=0"],
        "at step 1, batch 0",
        "new --workdir",
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_wrong_key(refused, free, name):
    arguments, *parts = KEYS[name]
    refused(arguments, *parts)
    if name != "it diverges":  # that one began, and its line says to take a new --workdir
        free()


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("train.evaluate_every", "train.evaluate_every must be positive, got 0"),
        ("train.batch_size", "train.batch_size must be positive, got 0"),
        ("stages.tune.steps", "stages.tune.steps must be positive, got 0"),
        ("stages.tune.learning_rate", "stages.tune.learning_rate must be positive, got 0"),
    ],
)
def test_a_reduction_names_keys_that_it_has(key, line):
    described = reduce_base()
    described.model = "somewhere"
    described.update(in_order({"tune": stage("tune", steps=3)}))
    described.train.batch_size = 2
    described.update_from_flattened_dict({key: 0})
    with pytest.raises(UserError, match=f"^{line}"):
        parse(described, reduce_from_dict)


FILES = {
    "typo in a key": ("config.train.update(stps=3)", "stps"),
    "typo in a group": ("config.trian.steps = 3", "trian"),
    "a new group": ("config.extra = 3", "config key extra is unknown"),
    "a key of a group is gone": ("del config.train.seed", "config key train.seed is missing"),
    "neither dense nor experts": ("config.model.moe = None", "model.feed_forward_width", "model.moe"),
    "dense on a mesh of experts": (
        "config.update(model=dict(moe=None, feed_forward_width=32), mesh=dict(expert=2))",
        "mesh.expert=2 needs experts",
    ),
    "syntax": ("config.train.steps = = 3", "wrong.py", "line"),
    "an undefined name": ("config.train.steps = STEPS", "STEPS"),
    "a failing import": ("import no_such_module", "no_such_module"),
    "an error of its own": ("1 / 0", "wrong.py", "division by zero"),
    "nothing returned": ("return None", "wrong.py", "get_config"),
    "unknown key of a variant": ("config.variants = {'big': {'model': {'wdith': 3}}}", "variants.big.model.wdith"),
    "variants are no groups": ("config.variants = {'big': 3}", "config key variants"),
    "a variant that cannot be": ("config.variants = {'big': {'model': {'layers': 0}}}", "model.layers"),
    "a variant that no key could name": ("config.variants = {'1e-2': {}}", "variant '1e-2'"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_configuration_file(refused, free, tmp_path, name):
    line, *parts = FILES[name]
    good = (tmp_path / "config.py").read_text()
    (tmp_path / "wrong.py").write_text(good.replace("    return config\n", f"    {line}\n    return config\n"))
    refused([], *parts, file=tmp_path / "wrong.py")
    free()


def test_an_override_of_what_a_variant_sets(refused, free, tmp_path):
    good = (tmp_path / "config.py").read_text()
    variants = "config.variants = {'big': {'train': {'steps': 30}}}"
    (tmp_path / "variants.py").write_text(good.replace("    return config\n", f"    {variants}\n    return config\n"))
    parts = ("--config.train.steps=10", "variant big sets train.steps itself")
    refused(["--config.train.steps=10"], *parts, file=tmp_path / "variants.py")
    free()


def test_missing_configuration_file(refused, tmp_path):
    refused([], "absent.py does not exist", file=tmp_path / "absent.py")


def test_configuration_without_the_function(refused, tmp_path):
    (tmp_path / "empty.py").write_text("STEPS = 3\n")
    refused([], "get_config", "empty.py", file=tmp_path / "empty.py")


def test_workdir_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused([], "--workdir=", "file/run", workdir=tmp_path / "file/run")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama"}', "\xff"])
def test_workdir_with_another_config_json(refused, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(content, encoding="latin-1")
    refused([], "--workdir=", "choose another")
    assert (tmp_path / "run/config.json").read_text(encoding="latin-1") == content


def test_tokenizer_and_model_disagree(refused, free, tmp_path, corpus, token_cache):
    data = corpus_data(corpus, token_cache)
    run_module.prepare(data, 384)
    prepared, *_ = [path for path in token_cache.iterdir() if (path / "manifest.json").exists()]
    (tmp_path / "text").mkdir()
    file = write_config(tmp_path / "text", data)
    arguments = [f"--config.data.tokenizer={prepared}", "--config.model.vocab_size=380"]
    refused(arguments, "384", "model.vocab_size is 380", file=file)
    free()


def test_truncated_tokens(refused, free, tmp_path, corpus):
    data = corpus_data(corpus, tmp_path / "cache")
    run_module.prepare(data, 384)
    (shard,) = (tmp_path / "cache").glob("*/train-00000.bin")
    shard.write_bytes(shard.read_bytes()[:-10])
    (tmp_path / "text").mkdir()
    refused([], "train-00000.bin is truncated", "delete", file=write_config(tmp_path / "text", data))
    free()


def test_corpus_smaller_than_a_batch(refused, free, tmp_path, corpus, token_cache):
    (tmp_path / "text").mkdir()
    file = write_config(tmp_path / "text", corpus_data(corpus, token_cache))
    refused(["--config.train.batch_size=4096"], "train.batch_size=4096", file=file)
    free()


def test_disk_full_during_a_checkpoint(refused, monkeypatch, tmp_path):
    manager = Checkpoints.save

    def full(self, step, state, position):
        monkeypatch.setattr(self._manager, "save", fails)
        manager(self, step, state, position)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    refused(["--config.train.steps=4"], "cannot write a checkpoint", "No space left", "same command again")
    monkeypatch.undo()
    monkeypatch.setattr(job, "peak", unmeasured_peak)
    assert main(["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}",
                 "--config.train.steps=4"]) == 0  # fmt: skip


def test_disk_full_for_real(tmp_path):
    file = write_config(tmp_path, token_data(tmp_path), train={"checkpoint_every": 5}, **CHEAP)
    started = command(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 16 && exec "$@"', "bash", *started],  # KiB a file
        env=environment(devices=1, cache=None),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-reduce train: cannot write a checkpoint below")
    assert "File too large" in line
    assert len(line) < 500
    assert not (tmp_path / "run/summary.json").exists()


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(refused, tmp_path, capsys):
    arguments = ["--config.train.steps=4", "--config.train.checkpoint_every=2"]
    train_it = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    assert main([*train_it, *arguments]) == 0
    (tmp_path / "run/summary.json").unlink()
    expected = (tmp_path / "run/model/model.safetensors").read_bytes()
    damages = {
        "cut short": lambda step: [cut(path) for path in step.rglob("*") if path.is_file()],
        "empty": lambda step: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in step.iterdir()],
        "without data": lambda step: shutil.rmtree(step / "data"),
        "other data": lambda step: (step / "data/metadata").write_text("[]"),
    }
    for damage in damages.values():
        shutil.rmtree(tmp_path / "run/model")
        damage(tmp_path / "run/checkpoints/4")
        capsys.readouterr()
        assert main([*train_it, *arguments]) == 0
        said = capsys.readouterr().out.splitlines()
        warning, resumed = [line for line in said if line.startswith(("warning", "resuming"))]
        assert warning.startswith(f"warning: checkpoint {tmp_path / 'run/checkpoints/4'} is damaged (")
        assert warning.endswith("going on from step 2")
        assert resumed.endswith("after step 2 of 4")
        assert (tmp_path / "run/damaged-checkpoints/4").is_dir()
        assert (tmp_path / "run/model/model.safetensors").read_bytes() == expected
        (tmp_path / "run/summary.json").unlink()
    for step in (2, 4):
        damages["cut short"](tmp_path / f"run/checkpoints/{step}")
    refused(arguments, "checkpoints/4 is damaged", "no earlier one can be read", "choose another workdir")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_line(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["command", "--help"]),
        (["trian"], ["trian", "train"]),
        (["train", "--config=x.py"], ["--workdir"]),
        (["train", "--workdir=x"], ["--config"]),
        (["train", "--config=x.py", "--workdir=x", "--processes=two"], ["--processes", "two"]),
    ],
)
def test_wrong_command_line(capsys, arguments, parts):
    line = one_line(arguments, capsys)
    assert line.startswith("moe-reduce")
    assert all(part in line for part in parts)


@pytest.mark.parametrize("name", ["", *__main__.COMMANDS])
def test_help(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([*([name] if name else []), "--help"])
    assert stopped.value.code == 0
    captured = capsys.readouterr()
    assert "usage: moe-reduce" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_help_describes_every_argument_and_its_default(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"moe_reduce.commands.{name.replace('-', '_')}").add_arguments(parser)
    for action in parser._actions:
        assert action.help, action.dest
        if not any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)) and action.default != []:
            assert "default:" in action.help, action.dest


def test_defects_of_ours_keep_their_traceback(monkeypatch, tmp_path):
    file = write_config(tmp_path, token_data(tmp_path))

    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(workdir, "claim", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"])


def test_nothing_was_written_where_it_should_not(tmp_path):
    file = write_config(tmp_path, token_data(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.model.layers=0"]) == 2
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_a_workdir_of_an_older_version_goes_on(tmp_path):
    """Keys that it does not know have their defaults there; another value is another configuration."""
    run = run_config("shared", token_data(tmp_path))
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    older = to_dict(run)
    del older["execution"]["exchange"], older["train"]["ema_decay"], older["data"]
    (workdir / "config.json").write_text(json.dumps(older))
    defaults = dataclasses.replace(run, data=DataConfig())
    claim(workdir, defaults)
    changed = dataclasses.replace(defaults, train=dataclasses.replace(run.train, ema_decay=0.5))
    with pytest.raises(UserError, match=r"train\.ema_decay is 0\.0 there and 0\.5 here"):
        claim(workdir, changed)


def test_a_reduction_of_an_older_version_goes_on(tmp_path):
    described = reduce_base()
    described.model = "somewhere"
    stages = {"pool": stage("pool"), "tune": stage("tune", steps=3)}
    described.update(in_order(stages))
    described.train.update(steps=3, batch_size=2)
    (run,) = parse(described, reduce_from_dict).values()
    older = to_dict(run)
    del older["stages"]["tune"]["adapter"], older["stages"]["pool"]["offset"]
    (tmp_path / "run/01-pool").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(json.dumps(older))
    claim(tmp_path / "run", run)


def test_another_corpus_is_refused_where_a_run_goes_on(refused, tmp_path):
    arguments = ["--config.train.steps=4", "--config.train.checkpoint_every=2"]
    train_it = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", *arguments]
    assert main(train_it) == 0
    for name in ("checkpoints/4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run/summary.json").unlink()
    right = (tmp_path / "tokens.npy").read_bytes()
    np.save(tmp_path / "tokens.npy", np.load(tmp_path / "tokens.npy")[::-1])
    refused(arguments, "is not what", "began with")
    (tmp_path / "tokens.npy").write_bytes(right)
    assert main(train_it) == 0
    (step,) = read_chain(tmp_path / "run/model")
    assert [entry.path for entry in step.inputs] == [str(tmp_path / "tokens.npy")]
