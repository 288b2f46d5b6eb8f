"""Data sets of the Hugging Face hub, or of a local directory in the hub's layout, streamed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_reduce.core.errors import UserError
from moe_reduce.data import files
from moe_reduce.data.sources.local_files import file_identity
from moe_reduce.data.sources.text_source import TextSource

PREFIX = "hub:"


class HubName(NamedTuple):
    """Parts of hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]; CONFIG may be empty, and SPLIT is train by default."""

    name: str
    config: str | None
    split: str
    revision: str | None


def parse_name(source: str) -> HubName:
    """Parse hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]; UserError when there is no name."""
    rest, _, revision = source.removeprefix(PREFIX).partition("@")
    name, _, rest = rest.partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise UserError(f"{source!r} names no data set: write hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]")
    return HubName(name, config or None, split or "train", revision or None)


class Hub(TextSource):
    """One split of a data set; every row is a document."""

    @classmethod
    def recognises(cls, name: str) -> bool:
        return name.startswith(PREFIX)

    def documents(self, text_field: str) -> Iterator[Iterable[str]]:
        import datasets  # takes seconds to import, and only hub sources need it

        hub = parse_name(self.name)
        try:
            rows = iter(
                datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True, revision=hub.revision)
            )
            number = 0
            while (row := next(rows, None)) is not None:
                number += 1
                yield (files.text_of(row, text_field, f"{self.name}, row {number}"),)
        except UserError:
            raise
        except Exception as error:  # the hub's client raises many types, none of which is a defect of this package
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                f"{self.name!r} cannot be read: {reason}; check the name, its config and the network, "
                "or name local text, such as 'my/*.txt' or python-stdlib"
            ) from error

    def identity(self) -> Iterator[bytes]:
        """Yield the name, and the content of a local data set.

        A remote data set without @COMMIT is identified by its name only: delete data.cache to fetch a newer version.
        """
        directory = Path(parse_name(self.name).name)
        yield self.name.encode()
        if directory.is_dir():
            yield from map(file_identity, sorted(path for path in directory.rglob("*") if path.is_file()))

    def plain_text(self) -> str | None:
        return None
