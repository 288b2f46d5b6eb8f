"""Mutations of every file format that is read, each in a forked process with limits: `python mutation_harness.py`.

Prints one JSON object a mutation: subject, file, way, places that it changed, verdict and detail. Verdicts: refused
(one line), same (what was read is what the valid file gives), different (something else was read), traceback, crash,
hang, memory.

The parent imports everything and computes nothing, because JAX's threads do not survive a fork.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mutation_places
import mutation_subjects
import mutations

from moe_reduce.core import memory
from moe_reduce.core.errors import UserError

SECONDS = 20  # of CPU
WAITED = 120  # seconds on the wall, for a busy machine
ADDRESSES = 3 * 2**30  # bytes of address space that a reader may add to what the imports take
RESIDENT = 2 * 2**30  # bytes of memory in use


class Result(NamedTuple):
    """What became of one mutation."""

    subject: str
    file: str
    way: str
    places: list[str]
    seed: int
    verdict: str
    detail: str


def read(subject: mutation_subjects.Subject, directory: Path) -> tuple[str, str]:
    """(verdict, detail) of reading in this process; read means that something was read: the detail is its hash."""
    try:
        return "read", hashlib.sha256(repr(subject.read(directory)).encode(errors="replace")).hexdigest()
    except UserError as error:
        return ("refused" if "\n" not in str(error) else "traceback"), str(error)
    except Exception as error:
        if memory.is_exhausted(error):  # the command line says so in one line
            return "refused", f"out of memory: {error}"
        return "traceback", "".join(traceback.format_exception(error))[-1500:]


def forked(subject: mutation_subjects.Subject, directory: Path) -> tuple[str, str]:
    """(verdict, detail) of `read` in a process of its own, under limits."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _limit()
        answer = json.dumps(read(subject, directory))
        os.write(sending, answer.encode(errors="replace")[:60_000])
        os._exit(0)
    os.close(sending)
    status, usage = _wait(child)
    with os.fdopen(receiving) as pipe:
        answer = pipe.read()
    if usage.ru_maxrss * 1024 > RESIDENT:
        return "memory", f"{usage.ru_maxrss / 2**20:.1f} GB"
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return ("hang" if late else "crash"), signal.Signals(os.WTERMSIG(status)).name
    verdict, detail = json.loads(answer) if answer else ("crash", f"status {status}")
    return verdict, detail


def _limit() -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESSES, taken + ADDRESSES))


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    end = time.monotonic() + WAITED
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def results(subjects: list[mutation_subjects.Subject], each: int, seed: int) -> Iterator[Result]:
    """Mutate every subject `each` times."""
    with tempfile.TemporaryDirectory() as root:
        valid, work = Path(root, "valid"), Path(root, "work")
        for subject in subjects:
            _in_child(lambda subject=subject: subject.make(valid))
            shutil.copytree(valid, work)
            expected = forked(subject, work)
            if expected[0] != "read":
                raise AssertionError(f"{subject.name} as it should be: {expected}")
            for number in range(each):
                shutil.rmtree(work)
                shutil.copytree(valid, work)
                chance = random.Random(zlib.crc32(f"{subject.name} {seed} {number}".encode()))
                file = chance.choice(sorted(path for path in work.rglob(subject.files) if path.is_file()))
                before = file.read_bytes()
                way = mutations.mutate(file, chance)
                changed = mutation_places.places(file.name, before, file.read_bytes())
                verdict, detail = forked(subject, work)
                if verdict == "read":
                    verdict, detail = ("same" if detail == expected[1] else "different"), ""
                name = str(file.relative_to(work))
                yield Result(subject.name, name, way, changed, number, verdict, detail.replace(root, ""))
            for made in (valid, work):
                shutil.rmtree(made)


def _in_child(make: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a command prints is no result
        try:
            make()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise AssertionError("a valid input could not be made")


def main() -> None:
    """Run the mutations that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=5, help="mutations of each subject")
    parser.add_argument("--only", help="names of subjects, comma separated")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    wanted = arguments.only.split(",") if arguments.only else None
    subjects = [subject for subject in mutation_subjects.SUBJECTS if wanted is None or subject.name in wanted]
    for result in results(subjects, arguments.each, arguments.seed):
        print(json.dumps(result._asdict()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
