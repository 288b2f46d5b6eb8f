"""Corpus, tokenizer and sequence length of a run."""

from dataclasses import dataclass
from typing import Literal

from moe_reduce.core.checks import in_range, positive
from moe_reduce.core.errors import UserError

TOKEN_IDS = ".npy"  # suffix of a source of token ids
UUID_PAIRS = "uuid-pairs:"  # prefix of a source of random keys and values, to be memorised


def content(source: str) -> Literal["text", "token_ids", "pairs"]:
    """Tell what a source holds, from its name: token ids, pairs of a prompt and a completion, or else text.

    Kinds of text are told apart in moe_reduce.data.sources.
    """
    if source.endswith(TOKEN_IDS):
        return "token_ids"
    return "pairs" if source.startswith(UUID_PAIRS) else "text"


@dataclass(frozen=True)
class DataConfig:
    """Corpus -> tokens on disk -> batches."""

    # python-stdlib | files by path or glob, comma separated | hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT] |
    # token ids as .npy | uuid-pairs:N (N random keys and values, to be memorised)
    source: str = "python-stdlib"
    text_field: str = "text"  # field of jsonl, parquet and hub rows; the prompt where completion_field is given
    completion_field: str | None = None  # field that follows the prompt; only its tokens are learned, one row per pair
    tokenizer: str = "train"  # train: SentencePiece on the corpus; or a tokenizer.model, tokenizer.json or directory
    sequence_length: int = 256
    validation_source: str | None = None  # separate validation text; None: validation_fraction of the source
    validation_fraction: float = 0.01
    document_mask: bool = False  # attention stays within a document
    max_documents: int | None = None
    cache: str = "runs/tokens"
    workers: int = 2  # tokenizing processes

    @property
    def learns_completions(self) -> bool:
        """True if the source gives pairs of a prompt and a completion, of which only the completion is learned."""
        return self.completion_field is not None or content(self.source) == "pairs"

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        positive("data", self, "sequence_length", "workers")
        if self.max_documents is not None:
            positive("data", self, "max_documents")
        in_range("data", self, "validation_fraction", 0.0, 1.0)
        if not self.source:
            raise UserError("data.source is empty: give python-stdlib, a path or glob, hub:NAME, or a .npy file")
        if self.validation_source is not None:
            self._check_validation_source(self.validation_source)
        if self.completion_field is not None and content(self.source) == "token_ids":
            raise UserError(
                "data.completion_field is a field of text rows, and data.source holds token ids: leave it None"
            )

    def _check_validation_source(self, source: str) -> None:
        if not source or content(source) != "text":
            raise UserError(
                f"data.validation_source={source!r} must name text, by a path or glob, python-stdlib or hub:NAME"
            )
        if self.learns_completions or content(self.source) == "token_ids":
            raise UserError("data.validation_source is for text: rows are divided by data.validation_fraction")
