"""Corpus, tokenizer and sequence length of a run."""

from dataclasses import dataclass

from moe_reduce.core.checks import in_range, positive
from moe_reduce.core.errors import UserError

UUID_PAIRS = "uuid-pairs:"  # prefix of data.source: random keys and values, to be memorised


@dataclass(frozen=True)
class DataConfig:
    """Corpus -> tokens on disk -> batches."""

    # python-stdlib | files by path or glob, comma separated | hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT] |
    # token ids as .npy | uuid-pairs:N (random keys and values, to be memorised)
    source: str = "python-stdlib"
    text_field: str = "text"  # field of jsonl, parquet and hub rows; the prompt where completion_field is given
    completion_field: str | None = None  # field that follows the prompt; only its tokens are learned, one row a pair
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
        """True where the source is pairs of a prompt and a completion, of which only the completion is learned."""
        return self.completion_field is not None or self.source.startswith(UUID_PAIRS)

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        positive(
            "data", self, "sequence_length", "workers", *(("max_documents",) if self.max_documents is not None else ())
        )
        in_range("data", self, "validation_fraction", 0.0, 1.0)
        if not self.source:
            raise UserError("data.source is empty: give python-stdlib, a path or glob, hub:NAME, or a .npy file")
        token_ids = self.source.endswith(".npy")
        if self.validation_source is not None:
            _check_text("data.validation_source", self.validation_source)
            if self.learns_completions or token_ids:
                raise UserError("data.validation_source is for text: rows are divided by data.validation_fraction")
        if self.completion_field is not None and token_ids:
            raise UserError(
                "data.completion_field is a field of text rows, and data.source holds token ids: leave it None"
            )


def _check_text(key: str, source: str) -> None:
    if not source or source.endswith(".npy") or source.startswith(UUID_PAIRS):
        raise UserError(f"{key}={source!r} must name text, by a path or glob, python-stdlib or hub:NAME")
