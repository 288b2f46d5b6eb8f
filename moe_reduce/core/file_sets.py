"""Several files of one result that are replaced at the same moment, although each is a file of its own.

The new files lie in `new/` of a hidden directory and the present ones in `old/`; a link `current` leads to one of the
two. Each file is first replaced by a link through `current` to its present content, which changes nothing for readers.
Turning `current` around changes all files in one step, and each link is then replaced by the file behind it. A kill at
any moment leaves all old files or all new ones under their names, and `recover` replaces the remaining links.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_reduce.core import disk

NEW, OLD, CURRENT = "new", "old", "current"


@contextlib.contextmanager
def replacing(files: Sequence[Path]) -> Iterator[Path]:
    """Yield an empty directory; at the end of the context, the files written there replace those of the same names.

    files: in one directory; the first one names the hidden directory. On a file system without symbolic links they are
    replaced one after the other, the first one last.
    """
    recover(files[0])
    with disk.temporary_beside(_place(files[0], hidden="")) as unfinished:
        new = unfinished / NEW
        new.mkdir()
        yield new
        _publish(unfinished, [file.parent.resolve() / file.name for file in files])


def _publish(unfinished: Path, files: Sequence[Path]) -> None:
    old = unfinished / OLD
    old.mkdir()
    for file in files:
        if file.exists():
            shutil.copyfile(file, old / file.name)
    try:
        (unfinished / CURRENT).symlink_to(OLD)
    except OSError:  # no symbolic links here
        disk.sync_below(unfinished)
        for file in reversed(files):
            (unfinished / NEW / file.name).replace(file)
        return
    disk.sync_below(unfinished)
    place = _place(files[0])
    unfinished.rename(place)
    try:
        for file in files:
            _replace_by_link(place, _link_of(place, file.name), file)
        _replace_by_link(place, NEW, place / CURRENT)  # all files change here
        disk.sync(place)
    finally:
        _settle(place)


def recover(first: Path) -> None:
    """Undo or complete a replacement that a kill interrupted. first: the file by which the set is named."""
    if _place(first).is_dir():
        _settle(_place(first))
    disk.recover(_place(first, hidden=""))


def _settle(place: Path) -> None:
    """Replace the links by the files that they lead to, or remove them where there was no file; end the replacement."""
    names = {path.name for folder in (NEW, OLD) for path in (place / folder).glob("*")}
    for name in sorted(names):
        file, source = place.parent / name, place / CURRENT / name
        if not file.is_symlink() or os.readlink(file) != _link_of(place, name):
            continue
        if source.exists():
            shutil.copyfile(source, place / "copy")
            disk.sync(place / "copy")
            os.replace(place / "copy", file)
        else:
            file.unlink()
    disk.sync(place.parent)
    shutil.rmtree(place, ignore_errors=True)


def _replace_by_link(place: Path, target: str, file: Path) -> None:
    link = place / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    os.replace(link, file)


def _place(first: Path, hidden: str = ".") -> Path:
    return first.parent.resolve() / f"{hidden}{first.name}-files"


def _link_of(place: Path, name: str) -> str:
    return f"{place.name}/{CURRENT}/{name}"
