"""Preparation of a corpus: text -> tokens on disk, cached by text, tokenizer and split.

Several processes or hosts may prepare the same corpus at once; all of them use the tokens of the first to finish.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tqdm

from moe_reduce.core import disk
from moe_reduce.core.data_config import DataConfig, content
from moe_reduce.core.errors import UserError
from moe_reduce.data import shards, sources
from moe_reduce.data.completions import Completions
from moe_reduce.data.library_tokenizer import LibraryTokenizer
from moe_reduce.data.pieces import SPLITS, TRAIN, VALIDATION, HeldOut, Piece, pieces, split_pieces
from moe_reduce.data.rows import TokenRows
from moe_reduce.data.shards import Manifest, ShardWriter, TokenSource, TokenStore
from moe_reduce.data.tokenizer_training import train_tokenizer
from moe_reduce.data.tokenizers import Tokenizer, load_tokenizer
from moe_reduce.data.tokenizing import tokenize

TRAIN_A_TOKENIZER = "train"
SAMPLED_CHARACTERS = 1 << 13  # size of the pieces that a tokenizer's training sample is made of
REMEDY = "free space there, or set data.cache to another place"
VERSION = 3  # of the rules by which text becomes tokens here
LIBRARIES = ("sentencepiece", "tokenizers", "transformers")  # whose versions may change the tokens
SCANNED_CHARACTERS = 1_000_000_000  # limit of the text scanned for that sample; a hub data set may be endless
logger = logging.getLogger(__name__)


def prepare(config: DataConfig, vocab_size: int) -> tuple[TokenSource, Tokenizer | None]:
    """Return the tokens of `config.source` and their tokenizer (None for .npy), from the cache or made now.

    vocab_size: the model's; a tokenizer trained here has exactly that many pieces, a given one at most.
    Raises UserError for a mistake in the configuration or its files, and when the cache cannot be written.
    """
    if content(config.source) == "token_ids":
        return TokenRows(config, vocab_size), None
    if config.learns_completions:
        if config.tokenizer == TRAIN_A_TOKENIZER:
            raise UserError("completions are learned by a model that has a tokenizer: set data.tokenizer to it")
        tokenizer = _given_tokenizer(config.tokenizer, vocab_size)
        completions = Completions(config, tokenizer)
        _check_id(completions.largest_id, vocab_size, tokenizer, config)
        return completions, tokenizer
    given = None if config.tokenizer == TRAIN_A_TOKENIZER else _given_tokenizer(config.tokenizer, vocab_size)
    corpus = sources.corpus_hash(config)
    if config.validation_source is not None:
        corpus += sources.corpus_hash(_validation(config))
    directory = _cache_directory(config, corpus, _tokenizer_key(given, vocab_size))
    if not directory.exists():
        _make(config, vocab_size, given, corpus, directory)
    return _open(directory, given)


def _given_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """Load a tokenizer; tokens added to it may lie beyond the model's vocabulary as long as no text has them."""
    tokenizer = load_tokenizer(path)
    if max(tokenizer.base_size, tokenizer.end_of_text + 1) > vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} pieces but model.vocab_size is {vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or name another data.tokenizer"
        )
    return tokenizer


def _check_id(largest: int, vocab_size: int, tokenizer: Tokenizer, config: DataConfig) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"{config.source} holds {tokenizer.decode([largest])!r}, which is token {largest} of {config.tokenizer}, "
            f"but model.vocab_size is {vocab_size}: use text without it, or a model with a row for it"
        )


def _tokenizer_key(given: Tokenizer | None, vocab_size: int) -> str:
    if given is None:
        return f"{TRAIN_A_TOKENIZER} {vocab_size}"
    return f"{type(given).__name__} {given.hash} {min(given.vocab_size, vocab_size)}"


def _cache_directory(config: DataConfig, corpus: str, tokenizer: str) -> Path:
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    parts = (VERSION, shards.FORMAT_VERSION, corpus, tokenizer, *libraries, config.validation_fraction)
    key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
    last_part = re.split(r"[/,]", config.source.rstrip("/"))[-1]
    name = re.sub(r"[^A-Za-z0-9-]+", "-", last_part).strip("-")[:40] or "corpus"
    return Path(config.cache).expanduser() / f"{name}-{key}"


def _open(directory: Path, given: Tokenizer | None) -> tuple[TokenStore, Tokenizer]:
    store = TokenStore(directory)
    # transformers takes seconds to read a directory again
    tokenizer = given if isinstance(given, LibraryTokenizer) else load_tokenizer(directory)
    if tokenizer.hash != store.manifest.tokenizer_hash:
        raise UserError(f"the tokenizer in {directory} is not the one of its tokens; delete {directory} and run again")
    lengths = f"{store.length(TRAIN):,} training and {store.length(VALIDATION):,} validation tokens"
    logger.info("%s in %s", lengths, directory)
    if store.manifest.left_out:
        logger.warning(
            "%d documents of data.source are left out of training, because data.validation_source holds them too",
            store.manifest.left_out,
        )
    return store, tokenizer


def _make(config: DataConfig, vocab_size: int, given: Tokenizer | None, corpus: str, directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        with _writing(directory):
            unfinished = stack.enter_context(disk.temporary_beside(directory))
        tokenizer = given or _trained_tokenizer(config, vocab_size)
        with _writing(directory):
            tokenizer.save(unfinished)
        manifest = _write_tokens(config, vocab_size, tokenizer, corpus, (unfinished, directory))
        with _writing(directory):
            manifest.save(unfinished)
            disk.sync_below(unfinished)
            try:
                unfinished.rename(directory)
            except OSError:
                if not directory.exists():  # otherwise another process has finished first, with the same tokens
                    raise


def _trained_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    cut = pieces(_held_out(config).without(sources.document_fragments(config)), SAMPLED_CHARACTERS)
    with _progress("sampling text") as bar:
        return train_tokenizer(_scanned((piece.text for piece in cut), bar), vocab_size)


def _scanned(texts: Iterable[str], bar: "tqdm.tqdm") -> Iterator[str]:
    scanned = 0
    for text in texts:
        yield text
        scanned += len(text)
        bar.update(len(text) / 1e6)
        if scanned >= SCANNED_CHARACTERS:
            return


def _write_tokens(
    config: DataConfig, vocab_size: int, tokenizer: Tokenizer, corpus: str, places: tuple[Path, Path]
) -> Manifest:
    """Tokenize the corpus. places: the unfinished directory, and the name that it will have."""
    dtype = shards.token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        writers = {split: ShardWriter(places[0], split, dtype) for split in SPLITS}
        for writer in writers.values():
            stack.callback(_close_quietly, writer)
        documents, bytes_of_text, left_out = _append_documents(config, vocab_size, tokenizer, writers, places[1])
        with _writing(places[1]):
            splits = {split: writer.close() for split, writer in writers.items()}
    return Manifest(
        format_version=shards.FORMAT_VERSION,
        tokenizer_hash=tokenizer.hash,
        corpus_hash=corpus,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.str,
        end_of_text=tokenizer.end_of_text,
        documents=documents,
        tokens=sum(shard.tokens for entries in splits.values() for shard in entries),
        bytes_of_text=bytes_of_text,
        splits=splits,
        left_out=left_out,
    )


def _append_documents(
    config: DataConfig, vocab_size: int, tokenizer: Tokenizer, writers: dict[str, ShardWriter], directory: Path
) -> tuple[int, int, int]:
    """Tokenize the corpus into the writers; return the numbers of documents, of bytes of text (UTF-8) and left out.

    Every split that holds a part of a document gets its end of text. Left out are training documents that the separate
    validation text holds as well.
    """
    held_out = _held_out(config)
    found = _divided(config, held_out)
    documents = bytes_of_text = 0
    splits: set[str] = set()  # that hold a part of the present document
    with _progress("tokenizing") as bar:
        for piece, ids in tokenize(found, tokenizer, config.workers):
            _check_id(int(ids.max(initial=0)), vocab_size, tokenizer, config)
            splits.add(piece.split)
            with _writing(directory):
                writers[piece.split].append(ids)
                for split in sorted(splits) if piece.last else ():
                    writers[split].append(np.array([tokenizer.end_of_text]))
            if piece.last:
                splits.clear()
                documents += 1
            size = len(piece.text.encode())
            bytes_of_text += size
            bar.update(size / 1e6)
    if not documents:
        raise UserError(f"{config.source!r} holds no text: give files that are not empty")
    return documents, bytes_of_text, held_out.left_out


def _divided(config: DataConfig, held_out: HeldOut) -> Iterator[Piece]:
    """Cut the corpus into pieces and assign each to training or validation."""
    fragments = held_out.without(sources.document_fragments(config))
    if config.validation_source is None:
        return split_pieces(fragments, config.validation_fraction)
    validation = pieces(sources.document_fragments(_validation(config)))
    return itertools.chain(pieces(fragments), (dataclasses.replace(piece, split=VALIDATION) for piece in validation))


def _held_out(config: DataConfig) -> HeldOut:
    """Read the documents of the separate validation text, if there is one; training leaves them out."""
    return HeldOut(() if config.validation_source is None else sources.document_fragments(_validation(config)))


def _validation(config: DataConfig) -> DataConfig:
    assert config.validation_source is not None
    return dataclasses.replace(config, source=config.validation_source)


def _close_quietly(writer: ShardWriter) -> None:
    """Close a writer whose disk may be full: closing then fails too, and the first error is the one to show."""
    with contextlib.suppress(OSError):
        writer.close()


def _progress(description: str) -> "tqdm.tqdm":
    # disable=None: no bar where stderr is not a terminal
    return tqdm.tqdm(desc=description, unit="MB", bar_format="{desc}: {n:.1f} MB [{elapsed}, {rate_fmt}]", disable=None)


def _writing(directory: Path) -> contextlib.AbstractContextManager[None]:
    return disk.writing(f"tokens to {directory}", REMEDY)
