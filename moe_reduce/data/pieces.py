"""Documents cut into bounded pieces, and each piece assigned to training or validation.

Pieces bound memory, spread one long document over several processes, and let a corpus of a few long books hold out
some text for validation. Tokenizing processes import this module: keep it free of JAX.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

PIECE_CHARACTERS = 1 << 16
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class Piece:
    """Consecutive text of one document; `last` is true for the last piece of each document."""

    document: int
    text: str
    last: bool
    split: str = TRAIN


def cut(fragments: Iterable[str], limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut text into pieces of at most `limit` characters, at the end of a line if possible, else of a word."""
    rest = ""
    for fragment in fragments:
        text, start = rest + fragment, 0
        while len(text) - start > limit:
            end = _boundary(text, start, start + limit)
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def _boundary(text: str, start: int, end: int) -> int:
    newline = text.rfind("\n", start, end)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", start + 1, end)  # a space belongs to the word that follows it, as in most vocabularies
    return space if space >= 0 else end


def pieces(documents: Iterable[Iterable[str]], limit: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Cut all documents into pieces, in order; an empty document has none."""
    for index, fragments in enumerate(documents):
        held = None
        for text in cut(fragments, limit):
            if held is not None:
                yield Piece(index, held, last=False)
            held = text
        if held is not None:
            yield Piece(index, held, last=True)


def split_pieces(documents: Iterable[Iterable[str]], validation_fraction: float) -> Iterator[Piece]:
    """Cut documents into pieces and assign about `validation_fraction` of them to validation, by a hash of their index.

    If the corpus is so small that the hash chooses none, that fraction of its end is held out instead (at most one
    piece's worth). So validation is empty only if the fraction is 0 or there is no text to divide.
    """
    tail: deque[Piece] = deque()  # the last piece's worth of text, held until its split is certain
    tail_characters = seen_characters = 0
    missing = validation_fraction > 0
    for number, piece in enumerate(pieces(documents)):
        if hash_fraction(f"{piece.document}/{number}") < validation_fraction:
            piece, missing = replace(piece, split=VALIDATION), False
        tail.append(piece)
        tail_characters += len(piece.text)
        seen_characters += len(piece.text)
        while tail and (not missing or tail_characters - len(tail[0].text) >= PIECE_CHARACTERS):
            tail_characters -= len(tail[0].text)
            yield tail.popleft()
    if missing:
        yield from _hold_out(list(tail), round(seen_characters * validation_fraction))
    else:
        yield from tail


class HeldOut:
    """Contents of documents, by hash, to leave the same documents out of another text.

    left_out: number of documents left out so far.
    """

    def __init__(self, documents: Iterable[Iterable[str]]):
        """Reads all documents, one fragment at a time."""
        self.left_out = 0
        self._starts: set[bytes] = set()
        self._whole: set[bytes] = set()
        for fragments in documents:
            start, rest = _start(fragments)
            whole = _digest(start)
            self._starts.add(_digest(start[:PIECE_CHARACTERS]).digest())
            for fragment in rest:
                whole.update(_bytes(fragment))
            self._whole.add(whole.digest())

    def without(self, documents: Iterable[Iterable[str]]) -> Iterator[Iterable[str]]:
        """Yield the documents that are not among these.

        A document is held in memory as a whole only if it starts like one of these.
        """
        for fragments in documents:
            start, rest = _start(fragments)
            if start and _digest(start[:PIECE_CHARACTERS]).digest() in self._starts:
                start, rest = start + "".join(rest), iter(())
                if _digest(start).digest() in self._whole:
                    self.left_out += 1
                    continue
            yield itertools.chain((start,), rest)


def _start(fragments: Iterable[str]) -> tuple[str, Iterator[str]]:
    """Split fragments into a text of at least PIECE_CHARACTERS, if there are as many, and the fragments after it."""
    rest, start, length = iter(fragments), [], 0
    for fragment in rest:
        start.append(fragment)
        length += len(fragment)
        if length >= PIECE_CHARACTERS:
            break
    return "".join(start), rest


def _digest(text: str) -> "hashlib.blake2b":
    return hashlib.blake2b(_bytes(text), digest_size=16)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def hash_fraction(name: str) -> float:
    """Pseudorandom number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _hold_out(tail: list[Piece], wanted: int) -> Iterator[Piece]:
    """Assign about the last `wanted` characters of the tail to validation, cutting at a line if there is one."""
    kept = sum(len(piece.text) for piece in tail) - max(wanted, 1)
    for piece in tail:
        end = max(0, min(kept, len(piece.text)))
        kept -= len(piece.text)
        if 0 < end < len(piece.text):
            end = piece.text.rfind("\n", 0, end) + 1 or end
        if end:
            yield replace(piece, text=piece.text[:end], last=piece.last and end == len(piece.text))
        if end < len(piece.text):
            yield replace(piece, text=piece.text[end:], split=VALIDATION)
