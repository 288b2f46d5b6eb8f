"""Results replace only what moe-reduce wrote itself, and the old or the new one is whole at any moment."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import pytest
from training_runs import MODELS, token_data, unmeasured_peak, write_config

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import disk, file_sets, locks, outputs
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.storage.manifest import verify
from moe_reduce.storage.model_directory import KIND
from moe_reduce.training import job

DEAD = 999_999_999  # no process has this id


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with model/, its pool/, tokens.npy, scores.json, and the finished run/ of a training."""
    place = tmp_path_factory.mktemp("made")
    model = Model(MODELS["layer"], init_params(MODELS["layer"], jax.random.key(0)), ExecutionConfig())
    moe_reduce.save(model, place / "model")
    data = token_data(place)
    steps = {"steps": 2, "warmup_steps": 1, "evaluate_batches": 1}
    config = write_config(place, data, train=steps, execution={"dispatch": "reference"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        assert main(["train", f"--config={config}", f"--workdir={place / 'run'}"]) == 0
    read = [f"--data={place / 'tokens.npy'}", "--sequence-length=32", "--batch-size=16"]
    assert main(["score", f"--model={place / 'model'}", *read, f"--out={place / 'scores.json'}"]) == 0
    assert main(["pool", f"--model={place / 'model'}", f"--out={place / 'pool'}"]) == 0
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def below(directory):
    """Every file below a directory with its content."""
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def commands(place):
    """Each kind of command, without --out, by name."""
    model, data = f"--model={place / 'model'}", [f"--data={place / 'tokens.npy'}", "--sequence-length=32"]
    return {
        "prune": ["prune", model, f"--scores={place / 'scores.json'}", "--keep=0.5"],
        "pool": ["pool", model],
        "prune-neurons": ["prune-neurons", model, "--keep=8"],
        "merge": ["merge", model, f"--adapter={place / 'run'}"],
        "export": ["export", model, "--format=stablehlo"],
        "evaluate": ["evaluate", model, *data],
        "monitor": ["monitor", model],
        "compare": ["compare", "--runs", str(place / "run"), "--prompt=x"],
        "report": ["report", "--runs", str(place / "run"), "--title=T", "--made-by=me"],
    }


COMMANDS = ("prune", "pool", "prune-neurons", "merge", "export", "evaluate", "monitor", "compare", "report")


def refused(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_replaces_what_it_could_not_have_written(place, name, capsys):
    """A workdir, a token cache, a published model, another kind of result, a home directory, a file, its own input."""
    published = place / "published"
    shutil.copytree(place / "model", published)
    (published / "manifest.json").unlink()
    (place / "tokens").mkdir()
    (place / "tokens/manifest.json").write_text('{"format_version": 1, "tokens": 3}')
    (place / "home").mkdir()
    (place / "home/thesis.txt").write_text("mine")
    (place / "deep/er").mkdir(parents=True)
    before = below(place)
    outs = ["run", "run/checkpoints", "tokens", "published", "home", "deep", "tokens.npy", "model", "."]
    for out in outs:
        line = refused([*commands(place)[name], f"--out={place / out}", "--overwrite"], capsys)
        assert str(place / out) in line
        assert "not overwritten" in line
        assert below(place) == before


def test_a_result_with_a_file_of_another_hand_stays(place, capsys):
    out = place / "pool"
    arguments = ["pool", f"--model={place / 'model'}", f"--out={out}", "--overwrite"]
    (out / "notes.txt").write_text("mine")
    line = refused(arguments, capsys)
    assert f"{out} holds notes.txt, which moe-reduce did not write" in line
    (out / "notes.txt").unlink()
    (out / "evaluation").mkdir()
    assert "holds evaluation" in refused(arguments, capsys)
    (out / "evaluation").rmdir()
    assert main(arguments) == 0
    assert verify(out) == []


def test_what_a_command_wrote_is_replaced(place):
    for name in ("prune", "evaluate", "report"):
        arguments = [*commands(place)[name], f"--out={place / f'{name}-out'}"]
        assert main(arguments) == 0
        assert main(arguments) == 2
        assert main([*arguments, "--overwrite"]) == 0


def test_figures_of_earlier_versions_are_replaced(place):
    """They have no mark of their own; the keys that evaluate has always written tell."""
    (place / "old").mkdir()
    content = {"model": "m", "baseline": None, "data": "d", "compute_dtype": "float32", "loss": 1.0}
    (place / "old/summary.json").write_text(json.dumps(content))
    assert main([*commands(place)["evaluate"], f"--out={place / 'old'}", "--overwrite"]) == 0
    assert json.loads((place / "old/summary.json").read_text())["loss"] != 1.0


@pytest.mark.parametrize("out", ["model", "model/pruned", ""])
def test_an_input_and_what_holds_it_or_lies_in_it_stay(place, out, capsys):
    target = place / out
    if out == "model/pruned":
        shutil.copytree(place / "pool", target)
    before = below(place)
    line = refused([*commands(place)["prune"], f"--out={target}", "--overwrite"], capsys)
    assert "which this command reads" in line
    assert below(place) == before


def test_a_link_to_an_input_is_that_input(place, capsys):
    (place / "link").symlink_to("model")
    line = refused([*commands(place)["pool"], f"--out={place / 'link'}", "--overwrite"], capsys)
    assert "which this command reads" in line


def test_scores_do_not_replace_other_files(place, capsys):
    data = [f"--data={place / 'tokens.npy'}", "--sequence-length=32", "--batch-size=16"]
    arguments = ["score", f"--model={place / 'model'}", *data, "--overwrite"]
    (place / "mine.json").write_text('{"a": 1}')
    (place / "sums.npz").write_bytes(b"mine")
    before = below(place)
    for name in ("mine.json", "sums.json", "run/config.json"):
        assert "not overwritten" in refused([*arguments, f"--out={place / name}"], capsys)
    assert below(place) == before
    assert main([*arguments, f"--out={place / 'scores.json'}"]) == 0


def test_scores_check_their_place_before_the_pass(place, monkeypatch, capsys):
    from moe_reduce.reduction import scores

    monkeypatch.setattr(scores, "collect", lambda *_: pytest.fail("the pass has begun"))
    data = [f"--data={place / 'tokens.npy'}", "--sequence-length=32"]
    line = refused(["score", f"--model={place / 'model'}", *data, f"--out={place / 'tokens.npy/below.json'}"], capsys)
    assert "cannot write" in line


def test_a_run_does_not_take_a_directory_that_holds_other_results(place, capsys):
    """adapt would replace its own base, train would take figures of evaluate for those of a finished run."""
    train = ["train", f"--config={place / 'config.py'}"]
    (place / "figures").mkdir()
    (place / "figures/summary.json").write_text('{"loss": 1.0}')
    shutil.copytree(place / "model", place / "project/model")
    before = below(place)
    for name in ("figures", "project"):
        line = refused([*train, f"--workdir={place / name}"], capsys)
        assert f"--workdir={place / name} holds" in line
    assert below(place) == before


def test_variants_do_not_replace_the_summary_of_a_single_run(place, capsys):
    good = (place / "config.py").read_text()
    variants = "    config.variants = {'big': {'train': {'seed': 1}}}\n    return config\n"
    (place / "variants.py").write_text(good.replace("    return config\n", variants))
    before = below(place / "run")
    line = refused(["train", f"--config={place / 'variants.py'}", f"--workdir={place / 'run'}"], capsys)
    assert "single run" in line
    assert below(place / "run") == before


def directories(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"files": {}, "chain": [], "parameters": name}))
    return tmp_path / "new", tmp_path / "old"


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_directory_takes_the_place_of_another(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(disk, "_exchange", lambda *_: False)
    target = directories(tmp_path)[1]
    with outputs.directory(target, KIND, overwrite=True) as unfinished:
        (unfinished / "manifest.json").write_text("new")
    assert (target / "manifest.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_on_linux_no_moment_is_without_the_directory(tmp_path, monkeypatch):
    new, old = directories(tmp_path)
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("renamed in two steps"))
    disk.publish(new, old)
    assert json.loads((old / "manifest.json").read_text())["parameters"] == "new"
    assert json.loads((new / "manifest.json").read_text())["parameters"] == "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_an_exchange_that_a_disk_cannot_do_is_told_from_one_that_fails(tmp_path, monkeypatch, number):
    class Library:
        @staticmethod
        def renameat2(*_):
            return -1

    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: Library)
    monkeypatch.setattr(disk.ctypes, "get_errno", lambda: number)
    new, old = directories(tmp_path)
    if number == errno.EINVAL:
        disk.publish(new, old)
        assert json.loads((old / "manifest.json").read_text())["parameters"] == "new"
    else:
        with pytest.raises(PermissionError):
            disk.publish(new, old)
        assert json.loads((old / "manifest.json").read_text())["parameters"] == "old"


@pytest.mark.parametrize("aside", [".out.replaced", f".out.elsewhere.{DEAD}.old"])
@pytest.mark.parametrize("replaced", [False, True], ids=["before", "after"])
def test_a_replacement_that_a_kill_interrupted_is_undone_or_completed(tmp_path, aside, replaced):
    new, old = directories(tmp_path)
    target = tmp_path / "out"
    old.rename(tmp_path / aside)
    if replaced:
        new.rename(target)
    with pytest.raises(UserError, match="exists"):
        outputs.check(target, KIND, overwrite=False)
    assert json.loads((target / "manifest.json").read_text())["parameters"] == ("new" if replaced else "old")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, renamed = [], []
    flush, rename = os.fsync, disk.Path.rename

    def noted(descriptor):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(disk.Path, "rename", lambda *given: renamed.append([*flushed]) or rename(*given))
    with outputs.directory(tmp_path / "out", KIND, overwrite=False) as unfinished:
        (unfinished / "weights").write_text("w")
        (unfinished / "below").mkdir()
        (unfinished / "below/more").write_text("m")
    assert {"weights", "more", "below", unfinished.name} <= set(*renamed)
    assert flushed[-1] == tmp_path.name
    flushed.clear()
    disk.write_json(tmp_path / "summary.json", {})
    assert len(flushed) == 2
    assert flushed[0].startswith(".summary.json.")


FILES = ("a.json", "a.npz", "a.png")


def written(tmp_path, name):
    for file in FILES:
        (tmp_path / file).write_text(name)


def plain(directory):
    """What the files of a directory hold; None for a link."""
    return {path.name: None if path.is_symlink() else path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_several_files_are_replaced_together(tmp_path, monkeypatch, links):
    def none(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(file_sets.Path, "symlink_to", none)
    written(tmp_path, "old")
    with file_sets.replacing([tmp_path / file for file in FILES]) as unfinished:
        written(unfinished, "new")
        assert (tmp_path / "a.json").read_text() == "old"
    assert {path.name: (path.read_text(), path.is_symlink()) for path in tmp_path.iterdir()} == dict.fromkeys(
        FILES, ("new", False)
    )


def test_a_failure_leaves_the_old_files(tmp_path, monkeypatch):
    written(tmp_path, "old")
    links = file_sets._replace_by_link

    def fails(place, target, file):
        if file.name == "a.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        links(place, target, file)

    monkeypatch.setattr(file_sets, "_replace_by_link", fails)
    with pytest.raises(OSError, match="No space"), file_sets.replacing([tmp_path / file for file in FILES]) as made:
        written(made, "new")
    assert {path.name: (path.read_text(), path.is_symlink()) for path in tmp_path.iterdir()} == dict.fromkeys(
        FILES, ("old", False)
    )


SECOND = """
import sys
from moe_reduce.core import locks
from pathlib import Path
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """holder(): a process that holds the lock of a workdir."""
    started = []

    def start(workdir):
        arguments = [sys.executable, "-c", SECOND, str(workdir / ".lock")]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_in_a_workdir_is_refused_until_the_first_one_ends(place, holder, capsys):
    workdir = place / "run"
    (workdir / "summary.json").unlink()
    first = holder(workdir)
    before = below(workdir)
    arguments = ["train", f"--config={place / 'config.py'}", f"--workdir={workdir}"]
    line = refused(arguments, capsys)
    assert f"--workdir={workdir} is in use by process {first.pid} on {socket.gethostname()}" in line
    assert below(workdir) == before
    first.kill()
    first.wait()
    assert main(arguments) == 0
    assert not (workdir / ".lock").exists()


def test_a_run_that_was_refused_leaves_no_lock(place, capsys):
    arguments = ["train", f"--config={place / 'config.py'}", f"--workdir={place / 'other'}", "--config.mesh.data=16"]
    assert "needs 16 devices" in refused(arguments, capsys)
    assert not (place / "other").exists()


def test_a_lock_that_its_holder_removes_at_the_same_time_is_taken_anew(tmp_path, monkeypatch):
    file, calls = tmp_path / ".lock", []
    lock = locks._lock

    def late(stream):
        lock(stream)
        calls.append(stream)
        if len(calls) == 1:
            file.unlink()  # by the holder that has just ended

    monkeypatch.setattr(locks, "_lock", late)
    with locks.held(file):
        assert file.exists()
    assert len(calls) == 2


def test_a_disk_without_locks_is_told_and_used(place, monkeypatch, capsys):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", missing)
    assert main(["train", f"--config={place / 'config.py'}", f"--workdir={place / 'run'}"]) == 0
    assert f"{place / 'run'} has no locks ([Errno {errno.ENOLCK}] No locks available)" in capsys.readouterr().out


def test_only_the_first_process_of_a_run_takes_the_lock(place, holder, monkeypatch):
    from moe_reduce.runs.workdir import alone

    holder(place / "run")
    job_of = alone(lambda run, workdir: (run, workdir))
    with pytest.raises(UserError, match="is in use by process"):
        job_of("run", place / "run")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert job_of("run", place / "run") == ("run", place / "run")
