"""Atomic files and directories: readers see the old content or the new, never a part."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_reduce.core.errors import UserError

ASIDE = ".old"  # suffix of a directory that is being replaced by another


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
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): restore it or remove it") from error


def write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    """Write content as JSON, atomically."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file atomically, even while other processes write the same file."""
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Make an empty directory for unfinished work beside `target`, removed at the end of the context.

    Directories that killed processes of this host left behind are removed first.
    """
    put_back(target)
    target = target.resolve()  # a link is followed: the work lies beside the directory that it points to
    for found in _left_behind(target):
        shutil.rmtree(found, ignore_errors=True)
    unfinished = target.parent / f"{_prefix(target)}{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def put_back(target: Path) -> None:
    """Undo a replacement that a kill interrupted: a directory that was moved aside gets its name back."""
    target = target.resolve()
    if not target.exists():
        for found in _left_behind(target):
            if found.name.endswith(ASIDE):
                found.rename(target)
                return


def _left_behind(target: Path) -> list[Path]:
    """Directories that killed processes of this host, or an earlier attempt of this process, left beside a target."""
    prefix, found = _prefix(target), []
    for path in target.parent.glob(f"{prefix}*"):
        owner = path.name.removeprefix(prefix).removesuffix(ASIDE)
        if owner.isdigit() and (int(owner) == os.getpid() or not is_running(int(owner))):
            found.append(path)
    return found


def _prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}."


def check_directory(target: Path, overwrite: bool, marker: str, kind: str) -> None:
    """Raise UserError unless a directory may be written at `target`.

    It may where nothing exists, and with `overwrite` where an empty directory or one of the same kind does. marker: the
    file by which a directory of this kind is recognised. kind: its name with an article, such as "a model directory".
    """
    put_back(target)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f"{target} exists: choose another path, or allow overwriting")
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise UserError(f"{target} is not {kind}, so it is not overwritten: choose another path")


def replace_directory(unfinished: Path, target: Path) -> None:
    """Rename a finished directory to its name, replacing a directory that has it."""
    target = target.resolve()
    if not target.exists():
        unfinished.rename(target)
        return
    # a directory cannot be renamed over one that is not empty, so the old one is first moved aside, whole
    aside = unfinished.with_name(f"{unfinished.name}{ASIDE}")
    target.rename(aside)
    unfinished.rename(target)
    shutil.rmtree(aside)


def is_running(process: int) -> bool:
    """Tell whether this host runs a process with this id, of any user."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True
