"""The launchers of several hosts: real processes over loopback, one of them killed; and every command, printed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import environment, metrics, token_data, write_config

from moe_reduce.training.metrics import TIMING

ROOT = Path(__file__).parent.parent
SECONDS = 400
TRAIN = {"steps": 60, "checkpoint_every": 5, "log_every": 3, "evaluate_every": 20}


class Hosts:
    """launch/hosts.sh in a copy of its own, where `ssh` is a shell on this machine."""

    def __init__(self, directory: Path, processes: int):
        self.directory = directory
        (directory / "launch").mkdir()
        (directory / "launch/hosts.sh").write_text((ROOT / "launch/hosts.sh").read_text())
        shell = directory / "shell"
        shell.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')
        shell.chmod(0o755)
        self.file = write_config(directory, token_data(directory), mesh={"data": 4}, train=TRAIN)
        self.environment = environment(devices=4 // processes, cache=directory / "compiled") | {
            "HOSTS": " ".join(["127.0.0.1"] * processes),
            "REMOTE_SHELL": str(shell),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "RESTARTS": "1",
            "GRACE": "90",
        }

    def start(self, workdir: str) -> subprocess.Popen:
        """The launcher, training in the workdir."""
        words = ["bash", "launch/hosts.sh", "train", f"--config={self.file}", f"--workdir={workdir}"]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=self.directory, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def log(self, process: int) -> str:
        """What a process has printed."""
        return (self.directory / f"runs/logs/hosts-{process}.log").read_text()


def kill(workdir: str, process: int) -> None:
    """SIGKILL to one process of the run."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if f"--workdir={workdir}".encode() in words and f"--process={process}".encode() in words:
            os.kill(int(entry.parent.name), signal.SIGKILL)


@pytest.mark.parametrize(
    ("processes", "victim"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_others_and_all_go_on(tmp_path, processes, victim):
    hosts = Hosts(tmp_path, processes)
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    _, errors = hosts.start(whole).communicate(timeout=SECONDS)
    assert (tmp_path / "whole/summary.json").exists(), errors
    launcher = hosts.start(killed)
    deadline = time.monotonic() + SECONDS
    while not list((tmp_path / "killed/checkpoints").glob("[0-9]*0")):
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(killed, victim)
    _, errors = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 0, errors
    assert f"process {victim} on 127.0.0.1 ended with status 137" in errors
    for survivor in set(range(processes)) - {victim}:
        # without the first process, and its store, the runtime may abort the others before they say their line
        assert victim == 0 or f"process {survivor} of {processes} has lost" in hosts.log(survivor)
        assert "Traceback" not in hosts.log(survivor)
    behind = re.findall(r"after step (\d+) of", hosts.log(0))
    assert len(behind) == 1, "it did not go on, but began again"
    assert 0 < int(behind[0]) < TRAIN["steps"]
    assert _result(tmp_path / "killed") == _result(tmp_path / "whole")


def _result(workdir: Path):
    """All that must be the same: the model's bytes, what was logged but for times, and the validation."""
    lines = [
        {name: value for name, value in line.items() if name not in TIMING}
        for split in ("train", "validation")
        for line in metrics(workdir, split)
    ]
    summary = json.loads((workdir / "summary.json").read_text())
    return (workdir / "model/model.safetensors").read_bytes(), lines, summary["validation"]


def test_a_mistake_is_not_tried_again(tmp_path):
    hosts = Hosts(tmp_path, processes=1)
    hosts.file.write_text("nothing")
    launcher = hosts.start("run")
    _, errors = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 2
    assert errors.count("ended with status 2") == 1


def test_processes_that_nobody_knows_are_a_mistake(tmp_path):
    words = ["train", f"--config={ROOT}/configs/quickstart_models.py", f"--workdir={tmp_path}/w", "--distributed"]
    plain = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "moe_reduce", *words], env=plain, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "no SLURM job" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def printed(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """What a launcher says it would run."""
    plain = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *words], env=plain | variables, capture_output=True, text=True, cwd="/"
    )


def test_every_host_gets_its_number():
    done = printed("hosts.sh", "train", "--config=c.py", HOSTS="a b", DRY_RUN="1", DIRECTORY="/d e", PORT="7")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\", "").splitlines()
    assert [line.split()[:3] for line in lines] == [["ssh", "-tt", "a"], ["ssh", "-tt", "b"]]
    for number, line in enumerate(lines):
        assert f"train --config=c.py --coordinator=a:7 --processes=2 --process={number}" in line


def test_slurm_starts_one_process_a_host_with_all_its_cards():
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    done = printed("slurm.sh", "train", "--config=c.py", DRY_RUN="1", PYTHON="python3", **job)
    assert done.stdout.split() == [
        "JAX_LOCAL_DEVICE_IDS=0,1,2,3", "srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", "python3", "-m",
        "moe_reduce", "train", "--config=c.py", "--distributed",
    ]  # fmt: skip


SLICE = {"NAME": "moe", "ZONE": "us-central2-b", "TYPE": "v4-32"}
# Google's command, of a slice of two workers, each a directory: what is run there is real.
GCLOUD = """#!/bin/bash
verb="$4" first="$5" worker="" command=""
for word in "$@"; do case "$word" in --worker=*) worker="${word#*=}" ;; --command=*) command="${word#*=}" ;; esac; done
echo "$verb" >>"$CLOUD/calls"
case "$verb" in
  describe)
    [[ -f "$CLOUD/trouble" ]] && { rm "$CLOUD/trouble"; echo "ERROR: 503" >&2; exit 1; }
    [[ -f "$CLOUD/state" ]] || { echo "ERROR: NOT_FOUND: no such node" >&2; exit 1; }
    cat "$CLOUD/state" ;;
  create) mkdir -p "$CLOUD/0" "$CLOUD/1"; echo READY >"$CLOUD/state" ;;
  delete)
    for group in "$CLOUD"/?/moe_reduce/runs/logs/*.group; do kill -KILL -- "-$(<"$group")" 2>/dev/null; done
    rm -rf "$CLOUD/0" "$CLOUD/1" "$CLOUD/state" ;;
  scp) for one in 0 1; do cp "$first" "$CLOUD/$one/moe_reduce.tar.gz"; done ;;
  ssh)
    command="${command//worker.sh install/worker.sh state none}"  # which takes minutes
    for one in 0 1; do
      if [[ "$worker" == all || "$worker" == "$one" ]]; then
        (cd "$CLOUD/$one" && HOME="$PWD" bash -c "$command") || exit 1
      fi
    done ;;
esac
"""
# In place of Python: it ends as the next line of `ends` says, with a status, or not by itself.
PROGRAM = """#!/bin/bash
(
  flock 8
  echo "$*" >>"$CLOUD/started"
  head -n 1 "$CLOUD/ends" >"$CLOUD/end.$$"
  sed -i 1d "$CLOUD/ends"
) 8>"$CLOUD/turn"
end="$(<"$CLOUD/end.$$")"
[[ "$end" == never ]] && exec sleep 300
exit "$end"
"""


class Cloud:
    """launch/tpu.sh and a slice behind it, in a directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name, text in {"gcloud": GCLOUD, "program": PROGRAM, "gcsfuse": "#!/bin/bash\n"}.items():
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        (directory / "started").touch()
        self.environment = SLICE | {
            "PATH": f"{directory}:{os.environ['PATH']}",
            "CLOUD": str(directory),
            "PYTHON": str(directory / "program"),
            "BUCKET": "mine",
            "EVERY": "0.2",
        }

    def tpu(self, *words: str) -> subprocess.CompletedProcess:
        """One command, to its end."""
        command = ["bash", str(ROOT / "launch/tpu.sh"), *words]
        # files and not pipes, which what goes on in the background would hold open
        with open(self.directory / "out", "w+") as out, open(self.directory / "err", "w+") as err:
            done = subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=120
            )
        text = [(self.directory / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(command, done.returncode, *text)

    def ends(self, *ends: str) -> None:
        """How the programs that are started next end, in turn."""
        (self.directory / "ends").write_text("".join(f"{end}\n" for end in ends))

    def lines(self, name: str) -> list[str]:
        """Of one of the files."""
        return (self.directory / name).read_text().splitlines()


@pytest.fixture
def cloud(tmp_path: Path):
    made = Cloud(tmp_path)
    assert made.tpu("create").returncode == 0
    assert made.tpu("sync").returncode == 0
    yield made
    if (tmp_path / "0").exists():
        assert made.tpu("stop").returncode == 0


RUN = ("train", "--config=a b.py", "--workdir=bucket/w")


def test_a_run_lives_on_every_worker_until_it_is_stopped(cloud: Cloud):
    cloud.ends("never", "never")
    for _ in range(2):  # the second finds it running, and leaves it alone
        done = cloud.tpu("run", *RUN)
        assert done.returncode == 0, done.stderr
        time.sleep(0.5)
        assert cloud.lines("started") == [f"-m moe_reduce {' '.join(RUN)} --distributed"] * 2
    other = cloud.tpu("run", "train", "--config=other.py")
    assert other.returncode != 0
    assert "stop that first" in other.stderr
    assert cloud.tpu("stop").returncode == 0
    cloud.ends("0", "0")
    assert cloud.tpu("run", "train", "--config=other.py").returncode == 0
    assert len(cloud.lines("started")) == 4


def test_a_slice_that_is_taken_away_is_made_again_and_its_run_goes_on(cloud: Cloud):
    cloud.ends("never", "never", "0", "0")
    launcher = subprocess.Popen(["bash", ROOT / "launch/tpu.sh", "watch", *RUN], env=cloud.environment)
    while len(cloud.lines("started")) < 2:
        time.sleep(0.05)
    (cloud.directory / "trouble").touch()  # one question that fails is no reason to delete anything
    while (cloud.directory / "trouble").exists():
        time.sleep(0.05)
    time.sleep(1)
    assert "delete" not in cloud.lines("calls")
    (cloud.directory / "state").write_text("PREEMPTED\n")
    assert launcher.wait(timeout=120) == 0
    assert cloud.lines("calls").count("delete") == 1
    assert len(cloud.lines("started")) == 4


@pytest.mark.parametrize(
    ("ends", "starts", "message"),
    [
        (["1", "3", "0", "0"], 4, ""),  # a process is lost: all begin again
        (["2", "2"], 2, "mistake in the command"),
        (["1"] * 20, 8, "again and again"),
    ],
)
def test_a_run_that_ends_is_started_again_unless_that_is_useless(cloud: Cloud, ends, starts, message):
    cloud.ends(*ends)
    done = cloud.tpu("watch", *RUN)
    assert len(cloud.lines("started")) == starts
    assert done.returncode == (2 if message else 0)
    assert message in done.stderr
    assert "delete" not in cloud.lines("calls")


TPU = {
    "create": ["create moe --zone=us-central2-b --accelerator-type=v4-32 --version=tpu-ubuntu2204-base --spot"],
    "sync": ["git ls-files", "scp", "--worker=all --command=mkdir -p moe_reduce"],
    "run": ["ssh moe --zone=us-central2-b --worker=all", "worker.sh start moe train --workdir=bucket/w --distributed"],
    "watch": ["describe", "delete moe", "create moe", "scp", "worker.sh start moe train"],
    "logs": ["--worker=0 --command=tail"],
    "status": ["describe moe", "--worker=0"],
    "stop": ["worker.sh stop moe"],
    "delete": ["delete moe --zone=us-central2-b --quiet"],
}


@pytest.mark.parametrize("command", TPU)
def test_every_step_of_a_slice_can_be_read_first(command):
    words = ["train", "--workdir=bucket/w"] if command in ("run", "watch") else []
    done = printed("tpu.sh", "--dry-run", command, *words, **SLICE, SPOT="1", BUCKET="mine")
    assert done.returncode == 0, done.stderr
    place = 0
    text = done.stdout.replace("\\", "")
    for part in TPU[command]:
        assert part in text[place:]
        place = text.index(part, place)


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        ("tpu.sh", ["create"], {"NAME": "moe"}, "set ZONE"),
        ("tpu.sh", ["run"], SLICE, "run what?"),
        ("tpu.sh", ["watch"], SLICE, "watch what?"),
        ("tpu.sh", ["watch", "train", "--workdir=w"], SLICE | {"BUCKET": "mine"}, "what lies on a slice goes with it"),
        ("tpu.sh", ["fly"], SLICE, "a TPU VM slice"),
        ("hosts.sh", ["train"], {}, "set HOSTS"),
        ("hosts.sh", [], {"HOSTS": "a"}, "what shall run?"),
        ("slurm.sh", [], {}, "what shall run?"),
    ],
)
def test_launchers_say_what_is_missing(script, words, variables, message):
    done = printed(script, *words, **variables)
    assert done.returncode == 2
    assert message in done.stderr
