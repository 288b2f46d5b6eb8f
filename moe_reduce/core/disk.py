"""Files and directories that are written whole or not at all."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_reduce.core.errors import UserError

ASIDE = ".old"  # behind the name of a directory that another replaces


@contextlib.contextmanager
def writing(place: str | Path, remedy: str) -> Iterator[None]:
    """OSErrors inside (a full disk, no permission, a disk that is gone) become a UserError in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {place} ({error.strerror or error}): {remedy}") from error


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds; UserError when it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): restore it or remove it") from error


def write_json(file: Path, content: Any, indent: int | None = 2) -> None:
    """Content as JSON; see `write_text`."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


def write_text(file: Path, text: str) -> None:
    """Whole or not at all, whoever else writes it."""
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """An empty directory for unfinished work, gone afterwards; those of killed processes of this host go as well."""
    put_back(target)
    target = target.resolve()  # beside what a link points to
    for found in _left_behind(target):
        shutil.rmtree(found, ignore_errors=True)
    unfinished = target.parent / f"{_prefix(target)}{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def put_back(target: Path) -> None:
    """A directory that a killed process had moved aside, to put another in its place, takes its name again."""
    target = target.resolve()
    if not target.exists():
        for found in _left_behind(target):
            if found.name.endswith(ASIDE):
                found.rename(target)
                return


def _left_behind(target: Path) -> list[Path]:
    """What killed processes of this host, and an earlier try of this one, left beside a target."""
    prefix, found = _prefix(target), []
    for path in target.parent.glob(f"{prefix}*"):
        owner = path.name.removeprefix(prefix).removesuffix(ASIDE)
        if owner.isdigit() and (int(owner) == os.getpid() or not is_running(int(owner))):
            found.append(path)
    return found


def _prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}."


def check_directory(target: Path, overwrite: bool, marker: str, kind: str) -> None:
    """Raises UserError unless a directory may be written here: nothing is, or what `marker` tells to be of this kind.

    kind: with its article, such as "a model directory"; only such a directory is ever overwritten.
    """
    put_back(target)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f"{target} exists: choose another path, or allow overwriting")
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise UserError(f"{target} is not {kind}, so it is not overwritten: choose another path")


def replace_directory(unfinished: Path, target: Path) -> None:
    """Renames a finished directory to its name, in place of one that may be there."""
    target = target.resolve()
    if not target.exists():
        unfinished.rename(target)
        return
    # A directory cannot be renamed over a full one: the old one steps aside, whole, for the moment between.
    aside = unfinished.with_name(f"{unfinished.name}{ASIDE}")
    target.rename(aside)
    unfinished.rename(target)
    shutil.rmtree(aside)


def is_running(process: int) -> bool:
    """Whether this host runs a process of this number, anyone's."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
