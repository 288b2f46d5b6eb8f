"""Scores of programs that a model wrote. Each runs in a child process with limits, which is no shield against malice.

The child has 5 s of processor time, 15 s in all, 1 GiB of memory, an empty temporary directory, files of 1 MiB, no
environment, and no network: where the system does not let it leave the network, it cannot import sockets.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECONDS, PROCESSOR_SECONDS = 15.0, 5
CHILD = """
import ctypes, os, resource, sys
token, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\\n", 1)
user, network = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
unshare = getattr(ctypes.CDLL(None), "unshare", None)
if unshare is None or (unshare(network) and unshare(user | network)):
    sys.modules["socket"] = sys.modules["_socket"] = None
limits = {{"CPU": {processor}, "AS": 1 << 30, "FSIZE": 1 << 20, "NOFILE": 64, "NPROC": 0, "CORE": 0}}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
exec(compile(program, "<program>", "exec"), {{}})
os.write({answer}, token.encode())
"""


def pass_at_1(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Share of questions whose program passes its tests (pass@1 of arXiv:2107.03374, one answer each).

    references: tests, in Python. predictions: a program, or a list of one.
    """
    programs = [answer if isinstance(answer, str) else answer[0] for answer in predictions]
    passed = [passes(f"{program}\n{test}") for program, test in zip(programs, references, strict=True)]
    return sum(passed) / len(passed)


def completed(responses: list[list[str]], documents: list[dict[str, str]]) -> list[list[str]]:
    """Programs of HumanEval: the question, continued by the answers."""
    return [
        [document["prompt"] + answer for answer in answers]
        for answers, document in zip(responses, documents, strict=True)
    ]


def passes(program: str) -> bool:
    """Whether a program runs to its end. One that exits before its end does not."""
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory() as directory, open(reading, "rb") as answer:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", CHILD.format(processor=PROCESSOR_SECONDS, answer=writing)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=directory, env={},
            pass_fds=[writing], start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        try:
            child.communicate(f"{token}\n{program}".encode("utf-8", "surrogatepass"), SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
        return child.returncode == 0 and answer.read().endswith(token.encode())


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        child.stdin.close()
