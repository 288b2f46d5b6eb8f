"""Interface of a kind of text source."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator


class TextSource(ABC):
    """Text that `data.source` names: its documents, and the identity of its content.

    Creating a source opens nothing; the methods raise UserError when the text does not exist or cannot be read.
    """

    def __init__(self, name: str):
        """name: the value of `data.source`, which `recognises` has accepted."""
        self.name = name

    @classmethod
    @abstractmethod
    def recognises(cls, name: str) -> bool:
        """Tell from the name alone whether it is a source of this kind."""

    @abstractmethod
    def documents(self, text_field: str) -> Iterator[Iterable[str]]:
        """Read the documents in order, each as consecutive fragments of its text.

        text_field: field of a row that holds the text; kinds without rows ignore it.
        """

    @abstractmethod
    def identity(self) -> Iterator[bytes]:
        """Yield what identifies the content, for a hash: bytes that differ where the documents may differ."""

    @abstractmethod
    def plain_text(self) -> str | None:
        """Name a part of the source that is plain text without fields; None if every document is a row of fields."""
