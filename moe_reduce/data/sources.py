"""Sources of text that `data.source` names: their documents as a stream, and a hash of their content.

    python-stdlib                    source and docstrings of the running Python's standard library (no network)
    PATH[,PATH...]                   files, directories or globs: txt, txt.gz, jsonl, jsonl.gz, jsonl.zst, parquet
    hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]  a split (train) of a data set of the Hugging Face hub, streamed
    PATH.npy                         token ids, int32 [sequences, T]: no text, see moe_reduce.data.rows

Tokenizing processes may import this module: keep it free of JAX.
"""

import glob
import hashlib
import itertools
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data import files

PYTHON_STDLIB = "python-stdlib"
HUB_PREFIX = "hub:"
NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test", "__pycache__"}  # directories of the stdlib to skip


class HubName(NamedTuple):
    """Parts of hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]; the config may be empty."""

    name: str
    config: str | None
    split: str
    revision: str | None


def documents(config: DataConfig) -> Iterator[str]:
    """Read the corpus, one document at a time, at most `max_documents`.

    Raises UserError when the source does not exist, is empty or cannot be read.
    """
    return ("".join(fragments) for fragments in document_fragments(config))


def document_fragments(config: DataConfig) -> Iterator[Iterable[str]]:
    """Read the corpus like `documents`, each as consecutive fragments, so that a huge file needs little memory.

    Consume the fragments of one document before asking for the next.
    """
    if config.source.startswith(HUB_PREFIX):
        found = _hub_documents(config)
    else:
        paths = source_files(config.source)
        found = itertools.chain.from_iterable(_read(path, config) for path in paths)
    return itertools.islice(found, config.max_documents)


def corpus_hash(config: DataConfig) -> str:
    """SHA-256 of everything that the tokens depend on: the content of local files, or the hub name, and the limits.

    A hub data set without @COMMIT is identified by its name only: delete data.cache to fetch a newer version.
    """
    digest = hashlib.sha256(f"{config.text_field}\0{config.max_documents}\0".encode())
    if config.source.startswith(HUB_PREFIX):
        directory = Path(parse_hub(config.source).name)
        digest.update(config.source.encode())
        paths = sorted(path for path in directory.rglob("*") if path.is_file()) if directory.is_dir() else []
    else:
        paths = source_files(config.source)
    for path in paths:
        digest.update(path.suffix.encode() + file_digest(path))
    return digest.hexdigest()


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's content; UserError when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path} ({error.strerror}): fix its permissions or name another text")


def source_files(source: str) -> list[Path]:
    """List the files of a local source, each once, sorted within each comma-separated part; never empty."""
    if source == PYTHON_STDLIB:
        return _stdlib_files()
    return list(dict.fromkeys(path for part in source.split(",") for path in _matches(part.strip())))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts)]
    if not paths:
        raise UserError(f"python-stdlib finds no .py files below {root}: name text files instead")
    return sorted(paths)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [entry for entry in sorted(path.rglob("*")) if entry.is_file() and files.is_known(entry)]
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(
            f"nothing matches {pattern!r} (looked in {Path.cwd()}); give python-stdlib, hub:OWNER/NAME, "
            f"or files ending in {', '.join(files.READERS)}"
        )
    return found


def _read(path: Path, config: DataConfig) -> Iterator[Iterable[str]]:
    if config.source != PYTHON_STDLIB:
        return files.read_documents(path, config.text_field)
    try:
        # a distribution may contain a module in another encoding, whose text is still used
        return iter([(path.read_text(encoding="utf-8", errors="replace"),)])
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_hub(source: str) -> HubName:
    """Parse hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]; UserError when there is no name."""
    rest, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    name, _, rest = rest.partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise UserError(f"{source!r} names no data set: write hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]")
    return HubName(name, config or None, split or "train", revision or None)


def _hub_documents(config: DataConfig) -> Iterator[Iterable[str]]:
    import datasets  # takes seconds to import, and only hub sources need it

    hub = parse_hub(config.source)
    try:
        rows = iter(datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True, revision=hub.revision))
        number = 0
        while (row := next(rows, None)) is not None:
            number += 1
            yield (files.text_of(row, config.text_field, f"{config.source}, row {number}"),)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many types, none of which is a defect of this package
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f"{config.source!r} cannot be read: {reason}; check the name, its config and the network, "
            "or name local text, such as 'my/*.txt' or python-stdlib"
        ) from error
