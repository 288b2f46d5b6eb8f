"""Kill a command before the n-th change that it makes to the file system, and look at what is left.

`Server` imports the package once in a process of its own and forks it for every command, so that a kill costs less than
a second. The forked process counts the changes below a directory (opening a file to write, renaming, removing, making
directories and links, flushing, exchanging) by an audit hook, and sends itself SIGKILL before the wanted one.

As a script it is that server: one JSON request a line in, one JSON answer a line out.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_reduce.core import disk

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# audit event -> places of the paths among its arguments, and of the directory descriptors that they are relative to
CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}
# what differs between two identical runs: dates, times and speeds, and the commit while someone works on this checkout
VOLATILE = {
    "date", "latency_seconds", "seconds", "tokens_per_second", "mfu", "compile_seconds", "evaluation_seconds", "commit",
}  # fmt: skip
UNCOMPARED = ("checkpoints", "tensorboard")


class Server:
    """A process that runs commands in forks of itself. Use it as a context."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, arguments: list[str], root: Path, kill_before: int = 0, exchanges: bool = True) -> dict[str, Any]:
        """Run moe-reduce; {"status", "changes", "output"}.

        kill_before: number of the change, 0 for none. exchanges: False as on a file system that cannot exchange names.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "root": str(root), "kill_before": kill_before, "exchanges": exchanges}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


@dataclasses.dataclass(frozen=True)
class Case:
    """A command in a directory of its own, which `prepare` fills; killed at each of its changes."""

    name: str
    arguments: list[str]
    root: Path
    inputs: tuple[str, ...]  # files and directories that it reads
    results: tuple[str, ...]  # files and directories that it writes; the first one says that the result is there
    resumes: bool = False  # the same command goes on, and says that a finished run is done
    redrawn: tuple[str, ...] = ()  # results that every call writes anew, those on a finished run included
    exchanges: bool = True  # the file system can exchange two names
    reader: tuple[str, ...] = ()  # arguments of a command that reads the result, run before looking at what is left


@dataclasses.dataclass
class Findings:
    """What all kills of some cases left."""

    kills: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    half_made: list[str] = dataclasses.field(default_factory=list)
    failed_reruns: list[str] = dataclasses.field(default_factory=list)
    not_identical: list[str] = dataclasses.field(default_factory=list)
    left_behind: list[str] = dataclasses.field(default_factory=list)

    def faults(self) -> dict[str, list[str]]:
        """Every list of faults that is not empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "kills" and value}

    def __str__(self) -> str:
        counts = {name: len(value) for name, value in dataclasses.asdict(self).items() if name != "kills"}
        return f"{self.kills} kills: " + ", ".join(
            f"{count} {name.replace('_', ' ')}" for name, count in counts.items()
        )


def examine(server: Server, case: Case, choose: Callable[[int], Iterable[int]], found: Findings) -> None:
    """Kill a case before each chosen change, and add what is wrong afterwards to `found`.

    choose: takes the number of changes of an uninterrupted run, returns the numbers of those to kill before.
    """
    before = case.root.with_name(f"{case.root.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(case.root, before, symlinks=True)
    old, inputs = content(case.root, case.results), content(case.root, case.inputs)
    whole = server.run(case.arguments, case.root, exchanges=case.exchanges)
    assert whole["status"] == 0, whole
    new, names = content(case.root, case.results), hidden(case.root)
    for number in choose(whole["changes"]):
        shutil.rmtree(case.root)
        shutil.copytree(before, case.root, symlinks=True)
        killed = server.run(case.arguments, case.root, number, case.exchanges)
        if killed["status"] != -signal.SIGKILL:  # threads make the number of changes vary a little
            assert killed["status"] == 0, killed
            continue
        found.kills += 1
        place = f"{case.name}, change {number} of {whole['changes']} ({killed['change']})"
        read = server.run([*case.reader], case.root, exchanges=case.exchanges) if case.reader else {"status": 0}
        left = content(case.root, case.results)
        if read["status"] != 0:
            found.lost.append(f"{place}: {read['output']}")
        if content(case.root, case.inputs) != inputs:
            found.lost.append(place)
        done = case.results[0] in left and left[case.results[0]] == new[case.results[0]]
        states = [_without(one, case.redrawn) for one in (left, old, new)]
        if states[0] not in states[1:] and (not case.resumes or done):
            found.half_made.append(place)
        again = server.run(case.arguments, case.root, exchanges=case.exchanges)
        refused = again["status"] == 2 and left == new and "exists" in again["output"]
        if again["status"] != 0 and not refused:
            found.failed_reruns.append(f"{place}: {again['output']}")
        if content(case.root, (*case.results, *case.inputs)) != new | inputs:
            found.not_identical.append(place)
        if hidden(case.root) - names:
            found.left_behind.append(f"{place}: {sorted(hidden(case.root) - names)}")


def _without(found: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name not in names}


def content(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests of what lies under these names, file by file, without what differs between identical runs."""
    found = {}
    for name in names:
        for file in sorted(_files(root / name)):
            if not set(file.relative_to(root).parts) & set(UNCOMPARED):
                found[str(file.relative_to(root))] = hashlib.sha256(_comparable(file)).hexdigest()
    return found


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for child in path.iterdir():
            yield from _files(child)
    elif path.exists():  # a link to nothing does not
        yield path


def _comparable(file: Path) -> bytes:
    if file.suffix not in (".json", ".jsonl"):
        return file.read_bytes()
    try:
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        return json.dumps([_stable(json.loads(line)) for line in lines], sort_keys=True).encode()
    except ValueError:
        return file.read_bytes()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(one) for name, one in value.items() if name not in VOLATILE}
    return [_stable(one) for one in value] if isinstance(value, list) else value


def hidden(root: Path) -> set[str]:
    """Hidden files and directories below a directory, outside checkpoints."""
    paths = (path.relative_to(root) for path in root.rglob(".*"))
    return {str(path) for path in paths if not set(path.parts) & set(UNCOMPARED)}


def _serve() -> None:
    """Answer requests until the input ends. Nothing here may start a JAX backend, whose threads a fork would lose."""
    answers = os.fdopen(os.dup(1), "w")
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    from training_runs import unmeasured_peak

    from moe_reduce.__main__ import COMMANDS, _module
    from moe_reduce.runs import adapt, reduce, train  # noqa: F401
    from moe_reduce.storage import export  # noqa: F401
    from moe_reduce.training import job

    for name in COMMANDS:
        _module(name)
    job.peak = unmeasured_peak
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(**json.loads(line))), file=answers, flush=True)


def _in_a_fork(arguments: list[str], root: str, kill_before: int, exchanges: bool) -> dict[str, Any]:
    reading, counting = os.pipe()
    with open(f"{root}.log", "w+b") as log:
        process = os.fork()
        if process == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            if not exchanges:
                disk._exchange = lambda *_: False
            os._exit(_run(arguments, root, kill_before, counting))
        os.close(counting)
        with os.fdopen(reading) as stream:
            changes = stream.read().splitlines()
        _, status = os.waitpid(process, 0)
        log.seek(0)
        output = log.read().decode(errors="replace")[-500:]
    code = os.waitstatus_to_exitcode(status)
    return {"status": code, "changes": len(changes), "change": (changes or [""])[-1], "output": output}


def _run(arguments: list[str], root: str, kill_before: int, counting: int) -> int:
    """Run the command in this process, which has just been forked; write a line for each change to `counting`."""
    from moe_reduce.__main__ import main

    count, flush = 0, os.fsync

    def changed(event: str) -> None:
        nonlocal count
        count += 1
        os.write(counting, f"{event}\n".encode())
        if count == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "ctypes.dlsym" and arguments[1] == "renameat2":
            changed("exchange")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            if _below(root, arguments[0], None):
                changed(f"open {arguments[0]}")
        elif event in CHANGES:
            places = [(arguments[at], None if by is None else arguments[by]) for at, by in CHANGES[event]]
            if any(_below(root, path, directory) for path, directory in places):
                changed(f"{event} {places[-1][0]}")

    def flushing(descriptor: int) -> None:
        if _below(root, f"/proc/self/fd/{descriptor}", None):
            changed("fsync")
        flush(descriptor)

    os.fsync = flushing
    sys.addaudithook(audit)
    try:
        return main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _below(root: str, path: Any, directory: int | None) -> bool:
    """Tell whether a path, perhaps relative to an open directory, lies below the root."""
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    path = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    if path.startswith("/proc/self/fd/"):
        path = os.readlink(path)
    return os.path.abspath(path).startswith(root + os.sep)


if __name__ == "__main__":
    _serve()
