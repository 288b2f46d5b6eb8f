"""Rules for what may be overwritten, for all commands, and results that appear under their names whole or not at all.

An existing result is replaced only if moe-reduce wrote it: its marker file says what kind of result it is and which
files belong to it. A directory that holds any other file stays, and so does one that is, holds or lies in an input.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moe_reduce.core import disk, file_sets, json_files
from moe_reduce.core.errors import UserError

REMEDY = "free some space or choose another path"


@dataclass(frozen=True)
class Kind:
    """Kind of a result, and how one that moe-reduce wrote is recognised.

    name: with an article, such as "a model directory". marker: name of the file that says what the result is. files:
    returns, from the path of that file, the names or patterns of all files of the result; None if the file is of
    another kind.
    """

    name: str
    marker: str
    files: Callable[[Path], Collection[str] | None]


def json_kind(name: str, marker: str, keys: Collection[str], files: Collection[str] | None = None) -> Kind:
    """Return a kind whose marker is a JSON object with certain keys.

    files: names or patterns of the files beside the marker; None: the marker names them itself, under "files" and
    "reports".
    """

    def found(file: Path) -> Collection[str] | None:
        content = _object(file)
        if not set(keys) <= set(content):
            return None
        listed = [content[key] for key in ("files", "reports") if isinstance(content.get(key), dict | list)]
        named = [name for names in listed for name in names if isinstance(name, str)]
        return {marker, *(named if files is None else files)}

    return Kind(name, marker, found)


def _object(file: Path) -> dict[str, Any]:
    """Content of a JSON file; {} if it is not an object in JSON."""
    try:
        return json_files.read_object(file)
    except (OSError, UserError):
        return {}


def check(target: Path, kind: Kind, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise UserError unless a result of this kind may be written at `target`, a directory.

    It may where nothing exists, and with `overwrite` in place of an empty directory or of a result of the same kind
    that moe-reduce wrote. inputs: what the command reads; nothing that is, holds or lies in one is replaced.
    """
    with disk.writing(target, "choose another path"):
        disk.recover(target)
    _check(target, kind, overwrite, inputs)


def _check(target: Path, kind: Kind, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    if not os.path.lexists(target):
        return
    _check_asked(target, overwrite, inputs)
    if not target.is_dir():
        raise UserError(f"{target} is not {kind.name}, so it is not overwritten: choose another path")
    names = sorted(path.name for path in target.iterdir())
    if not names:
        return
    known = kind.files(target / kind.marker) if (target / kind.marker).is_file() else None
    if known is None:
        raise UserError(
            f"{target} is not {kind.name} that moe-reduce wrote, so it is not overwritten: choose another path"
        )
    for name in names:
        if not (target / name).is_file() or not any(fnmatch(name, pattern) for pattern in known):
            raise UserError(
                f"{target} holds {name}, which moe-reduce did not write, so it is not overwritten: move {name} or "
                "choose another path"
            )


def check_files(files: Sequence[Path], kind: Kind, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise UserError unless a result of several files may be written. files: the first one is its marker."""
    with disk.writing(files[0], "choose another path"):
        file_sets.recover(files[0])
    _check_files(files, kind, overwrite, inputs)


def _check_files(files: Sequence[Path], kind: Kind, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    existing, inputs = [file for file in files if os.path.lexists(file)], [*inputs]
    for file in existing:
        _check_asked(file, overwrite, inputs)
    known = kind.files(files[0]) if files[0].is_file() else None
    for file in existing:
        if known is None or not file.is_file():
            raise UserError(
                f"{file} is not of {kind.name} that moe-reduce wrote, so it is not overwritten: choose another path"
            )


def _check_asked(target: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raise UserError for an existing target that may not be replaced, whatever it is."""
    if not overwrite:
        raise UserError(f"{target} exists: choose another path or add --overwrite (in Python overwrite=True)")
    place = target.resolve()
    for path in inputs:
        relation = _relation(place, path.resolve())
        if relation:
            raise UserError(
                f"{target} {relation} {path}, which this command reads, so it is not overwritten: choose another path"
            )


def _relation(place: Path, read: Path) -> str:
    if place == read:
        return "is"
    if place in read.parents:
        return "holds"
    return "lies in" if read in place.parents else ""


@contextlib.contextmanager
def directory(target: Path, kind: Kind, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory that gets the name `target` at the end of the context; after an error it is removed.

    Raises UserError when `target` exists and may not be replaced (see `check`), or cannot be written.
    """
    check(target, kind, overwrite)
    with disk.writing(target, REMEDY), disk.temporary_beside(target) as unfinished:
        yield unfinished
        _check(target, kind, overwrite)  # again, because making the result may have taken hours
        disk.publish(unfinished, target)


@contextlib.contextmanager
def file_set(files: Sequence[Path], kind: Kind, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory whose files replace those of the same names at the end of the context, all or none.

    files: as in `check_files`, which is asked again before the replacement.
    """
    with disk.writing(files[0], REMEDY), file_sets.replacing(files) as unfinished:
        yield unfinished
        _check_files(files, kind, overwrite)


def check_writable(target: Path) -> None:
    """Raise UserError when nothing can be written at `target`, before anything is computed."""
    with disk.writing(target, "choose another path"), disk.temporary_beside(target):
        pass
