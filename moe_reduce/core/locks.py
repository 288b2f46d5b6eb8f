"""Locks on files that end with the process that holds them, however it ends."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class LockHeld(Exception):
    """The lock is held by another process, which the message names."""


class LocksMissing(Exception):
    """The file system has no locks."""


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the lock of a file, made if necessary and removed afterwards, inside the context.

    The lock is flock(2): Linux passes it on to the server of an NFS disk, so it also holds between hosts. Raises
    LockHeld when another process has it, LocksMissing where there are none, OSError when the file cannot be written.
    """
    stream = _locked(file)
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        stream.close()


def _locked(file: Path) -> TextIO:
    while True:
        stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            _lock(stream)
            if os.path.exists(file) and os.path.samestat(os.fstat(stream.fileno()), os.stat(file)):
                return stream
            stream.close()  # its holder has just removed the file
        except BaseException:
            stream.close()
            raise


def _lock(stream: TextIO) -> None:
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        raise LockHeld(stream.read() or "another process") from None
    except (ImportError, OSError) as error:  # Windows, or a disk mounted without locks
        raise LocksMissing(str(error)) from None
