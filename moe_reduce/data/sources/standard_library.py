"""Source and docstrings of the running Python's standard library: text that needs no network."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_reduce.core.errors import UserError
from moe_reduce.data.sources.local_files import file_identity, unreadable
from moe_reduce.data.sources.text_source import TextSource

NAME = "python-stdlib"
SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__"}  # directories


class StandardLibrary(TextSource):
    """The .py files of the standard library without its tests; every file is a document."""

    @classmethod
    def recognises(cls, name: str) -> bool:
        return name == NAME

    def documents(self, text_field: str) -> Iterator[Iterable[str]]:
        del text_field
        for path in self.paths():
            try:
                # a distribution may contain a module in another encoding, whose text is still used
                yield (path.read_text(encoding="utf-8", errors="replace"),)
            except OSError as error:
                raise unreadable(path, error) from error

    def identity(self) -> Iterator[bytes]:
        return map(file_identity, self.paths())

    def plain_text(self) -> str | None:
        return self.name

    def paths(self) -> list[Path]:
        """List the modules, sorted; never empty."""
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
        if not paths:
            raise UserError(f"{NAME} finds no .py files below {root}: name text files instead")
        return sorted(paths)
