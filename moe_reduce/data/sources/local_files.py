"""Local files, directories and globs: txt, jsonl and parquet, compressed or not."""

import glob
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_reduce.core.errors import UserError
from moe_reduce.data import files
from moe_reduce.data.sources.text_source import TextSource


class LocalFiles(TextSource):
    """Comma-separated paths of files, of directories (every file of a known kind below them), and globs."""

    @classmethod
    def recognises(cls, name: str) -> bool:
        del name
        return True

    def documents(self, text_field: str) -> Iterator[Iterable[str]]:
        for path in self.paths():
            yield from files.read_documents(path, text_field)

    def identity(self) -> Iterator[bytes]:
        return map(file_identity, self.paths())

    def plain_text(self) -> str | None:
        return next((str(path) for path in self.paths() if not files.has_fields(path)), None)

    def paths(self) -> list[Path]:
        """List the files, each once, sorted within each comma-separated part; never empty."""
        return list(dict.fromkeys(path for part in self.name.split(",") for path in _matches(part.strip())))


def file_identity(path: Path) -> bytes:
    """Suffix and SHA-256 of a file, which decide how it is read and what it says; UserError when it is unreadable."""
    try:
        with open(path, "rb") as file:
            return path.suffix.encode() + hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """Make the error for a file that cannot be opened or read."""
    return UserError(f"cannot read {path} ({error.strerror}): fix its permissions or name another text")


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
            f"nothing matches {pattern!r} (looked in {Path.cwd()}); give files ending in {', '.join(files.READERS)}, "
            "or another source, such as python-stdlib or hub:OWNER/NAME"
        )
    return found
