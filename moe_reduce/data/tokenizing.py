"""Tokenizing of pieces in parallel processes, in order, with a bounded number of tasks in flight.

The processes import this module: keep it free of JAX, grain and datasets. They are spawned, because forking a process
that runs JAX's threads can deadlock.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moe_reduce.core.errors import UserError
from moe_reduce.data.pieces import Piece
from moe_reduce.data.tokenizers import Tokenizer

TASK_CHARACTERS = 1 << 18  # enough to outweigh the cost of sending a task to a process
TASKS_PER_WORKER = 4  # in flight at once: no worker idles, and memory stays at a few MB

_tokenizer: Tokenizer | None = None  # in a tokenizing process: set once, by _start


class Part(NamedTuple):
    """Text that is encoded in one go; `continued` where it follows a newline of the same document."""

    piece: Piece
    continued: bool


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Piece, np.ndarray]]:
    """Tokenize pieces, in order: each with its ids, uint32 [tokens].

    The ids are those of whole documents: pieces between which the tokenizer does not part a text are joined into one.
    Raises UserError when a process is killed, for example for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    in_flight: deque[tuple[list[Part], Future[tuple[np.ndarray, list[int]]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tokenizer,)) as executor:
        try:
            for task in _tasks(joined(pieces, tokenizer)):
                texts, continued = [part.piece.text for part in task], [part.continued for part in task]
                with bare_main():
                    in_flight.append((task, executor.submit(_encode, texts, continued)))
                if len(in_flight) >= TASKS_PER_WORKER * workers:
                    yield from _collect(*in_flight.popleft())
            while in_flight:
                yield from _collect(*in_flight.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenizing process was killed, probably for lack of memory: lower data.workers and run again"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def joined(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Part]:
    """Join neighbouring pieces of a document and a split that the tokenizer does not encode apart."""
    newest: Piece | None = None
    texts: list[str] = []
    continued = False
    for piece in pieces:
        follows = newest is not None and not newest.last and newest.document == piece.document
        apart = newest is None or not follows or tokenizer.parts(newest.text, piece.text)
        if newest is not None and (apart or newest.split != piece.split):
            yield Part(replace(newest, text="".join(texts)), continued)
            texts.clear()
        if not texts:
            continued = follows and apart
        texts.append(piece.text)
        newest = piece
    if newest is not None:
        yield Part(replace(newest, text="".join(texts)), continued)


def _tasks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    task: list[Part] = []
    characters = 0
    for part in parts:
        task.append(part)
        characters += len(part.piece.text)
        if characters >= TASK_CHARACTERS:
            yield task
            task, characters = [], 0
    if task:
        yield task


def _collect(task: list[Part], result: "Future[tuple[np.ndarray, list[int]]]") -> Iterator[tuple[Piece, np.ndarray]]:
    ids, counts = result.result()
    yield from zip((part.piece for part in task), np.split(ids, np.cumsum(counts)[:-1]), strict=True)


@contextlib.contextmanager
def bare_main() -> Iterator[None]:
    """Hide the main module from spawned processes, which would import it again.

    That is slow, and a script without `if __name__ == "__main__"` would start processes without end.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(tokenizer: Tokenizer) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends this one
    _tokenizer = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends, since a killed parent cannot tell its processes to end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode(texts: list[str], continued: list[bool]) -> tuple[np.ndarray, list[int]]:
    assert _tokenizer is not None
    encoded = [np.asarray(ids, dtype=np.uint32) for ids in _tokenizer.encode_parts(texts, continued)]
    return np.concatenate(encoded), [len(ids) for ids in encoded]
