"""Atomic files and directories: readers see the old content or the new, never a part, whenever a process is killed."""

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_reduce.core import json_files
from moe_reduce.core.errors import UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # from file systems that cannot exchange names
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
DISCARDED = ".discarded"  # suffix of a directory that is being removed
ATTEMPTS = 10  # to replace a directory that another process replaces at the same time


@contextlib.contextmanager
def writing(target: str | Path, remedy: str) -> Iterator[None]:
    """Turn an OSError inside the context (full disk, no permission, lost disk) into a UserError.

    target: what is written; remedy: what the user can do about it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error}): {remedy}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; UserError when the file is damaged."""
    return json_files.read_object(file, "restore it or remove it")


def write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    """Write content as JSON, atomically."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file atomically, even while other processes write the same file."""
    with replacing(file) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that takes the place of `file` at the end of the context."""
    _remove_left_behind(file)
    temporary = file.with_name(f"{_prefix(file)}{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk itself.

    Called before the rename that makes a result real: after a power loss the name must not lead to missing bytes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not flush directories
            raise
    finally:
        os.close(descriptor)


def sync_below(directory: Path) -> None:
    """Flush a directory and everything in it to the disk itself."""
    for path, _, files in os.walk(directory, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(path, name)):
                sync(Path(path, name))
        sync(Path(path))


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Make an empty directory for unfinished work beside `target`, removed at the end of the context.

    What killed processes of this host left behind is removed first.
    """
    target = target.resolve()  # a link is followed: the work lies beside the directory that it points to
    recover(target)
    unfinished = target.parent / f"{_prefix(target)}{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(unfinished: Path, target: Path) -> None:
    """Give a finished directory its name, in place of a directory that has it; both are on the disk at any moment.

    The two exchange their names in one step where the file system can do that. Elsewhere the old one is first moved
    aside, and `recover` gives it its name back if a kill comes between the two renames.
    """
    target = target.resolve()
    sync_below(unfinished)
    for _ in range(ATTEMPTS):
        try:
            if not target.exists():
                unfinished.rename(target)
            elif not _exchange(unfinished, target):
                _discard(_aside(target), target)
                target.rename(_aside(target))
                unfinished.rename(target)
                _discard(_aside(target), target)
            break
        except OSError as error:  # another process has written the same directory in the meantime
            if error.errno not in NOT_EMPTY:
                raise
    else:
        raise UserError(f"{target} is written by other processes at the same time: choose another path")
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):  # not Linux
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _discard(aside: Path, target: Path) -> None:
    """Remove a directory that was moved aside, first its name: `recover` must not take a part of it for the whole."""
    garbage = target.parent / f"{_prefix(target)}{os.getpid()}{DISCARDED}"
    if aside.is_dir():
        aside.rename(garbage)
        shutil.rmtree(garbage, ignore_errors=True)


def _aside(target: Path) -> Path:
    """The name of a directory while another takes its place, the same for every process and host."""
    return target.with_name(f".{target.name}.replaced")


def recover(target: Path) -> None:
    """Undo or complete what a killed process left half done at `target`; called before anything is written there.

    A directory that was moved aside gets its name back, or is removed if the new one has taken the name. Unfinished
    work of killed processes of this host is removed.
    """
    target = target.resolve()
    if not target.name or not target.parent.is_dir():  # the root, or nothing yet
        return
    _remove_left_behind(target)
    for aside in [_aside(target), *_moved_aside_earlier(target)]:
        if not target.exists() and aside.is_dir():
            aside.rename(target)
        _discard(aside, target)


def restored(target: Path) -> Path:
    """Return `target`, after giving a directory that a killed process moved aside its name back. For readers.

    UserError with the command to do so where this process may not rename it.
    """
    place = target.resolve()
    if place.exists() or not place.name or not place.parent.is_dir():
        return target
    for aside in [_aside(place), *_moved_aside_earlier(place)]:
        if aside.is_dir():
            with writing(target, f"a killed --overwrite moved it aside; run mv {aside} {place}"):
                aside.rename(place)
            break
    return target


def _moved_aside_earlier(target: Path) -> list[Path]:
    """Directories that earlier versions moved aside, under names with host and process."""
    found = target.parent.glob(f"{glob.escape(f'.{target.name}.')}*.old")
    owners = [(path, path.name.split(".")[-2]) for path in found]
    return [path for path, owner in owners if owner.isdigit() and not is_running(int(owner))]


def _remove_left_behind(target: Path) -> None:
    """Remove the unfinished work of killed processes of this host, or of an earlier attempt of this process."""
    prefix = _prefix(target)
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        owner = path.name.removeprefix(prefix).removesuffix(DISCARDED)
        if owner.isdigit() and (int(owner) == os.getpid() or not is_running(int(owner))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}."


def is_running(process: int) -> bool:
    """Tell whether this host runs a process with this id, of any user."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True
