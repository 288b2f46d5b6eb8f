"""Sources of text that `data.source` names: their documents as a stream, and a hash of their content.

    python-stdlib                             source and docstrings of the running Python's standard library
    hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT]  a split (default: train) of a data set of the Hugging Face hub, streamed
    PATH[,PATH...]                            files, directories or globs: txt, jsonl and parquet, compressed or not

A new kind of source is a module with a subclass of TextSource, and its entry in KINDS. Tokenizing processes may import
this package: keep it free of JAX.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from moe_reduce.core.config import DataConfig
from moe_reduce.data.sources.hub import Hub
from moe_reduce.data.sources.local_files import LocalFiles
from moe_reduce.data.sources.standard_library import StandardLibrary
from moe_reduce.data.sources.text_source import TextSource

KINDS: tuple[type[TextSource], ...] = (StandardLibrary, Hub, LocalFiles)  # the last takes every remaining name


def text_source(name: str) -> TextSource:
    """Return the source that a name such as `data.source` stands for, of the first kind that recognises it."""
    return next(kind for kind in KINDS if kind.recognises(name))(name)


def documents(config: DataConfig) -> Iterator[str]:
    """Read the corpus, one document at a time, at most `max_documents`.

    Raises UserError when the source does not exist, is empty or cannot be read.
    """
    return ("".join(fragments) for fragments in document_fragments(config))


def document_fragments(config: DataConfig) -> Iterator[Iterable[str]]:
    """Read the corpus like `documents`, each as consecutive fragments, so that a huge file needs little memory.

    Consume the fragments of one document before asking for the next.
    """
    return itertools.islice(text_source(config.source).documents(config.text_field), config.max_documents)


def corpus_hash(config: DataConfig) -> str:
    """SHA-256 of everything that the documents depend on: the content of the source, its text field and its limit."""
    digest = hashlib.sha256(f"{config.text_field}\0{config.max_documents}\0".encode())
    for part in text_source(config.source).identity():
        digest.update(part)
    return digest.hexdigest()
