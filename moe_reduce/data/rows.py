"""Token ids from a .npy file of whole sequences, with the interface of a prepared corpus."""

import copy
import math
from pathlib import Path

import numpy as np

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.shards import TokenSource

CHECKED_ROWS = 4096


class TokenRows:
    """Memory-mapped int32 [sequences, T]; the last `validation_fraction` of the sequences are for validation.

    A row's targets are the row shifted by one; its last position has no target.
    """

    directory = end_of_text = None

    def __init__(self, config: DataConfig, vocab_size: int):
        """Raises UserError when the file is not integers [sequences, data.sequence_length] below `vocab_size`."""
        path = Path(config.source).expanduser()
        if config.document_mask:
            raise UserError(f"data.document_mask needs documents, but {path} holds plain rows: set it to False")
        tokens = _open(path)
        if tokens.shape[1] != config.sequence_length:
            raise UserError(
                f"{path} has sequences of {tokens.shape[1]} tokens but data.sequence_length is "
                f"{config.sequence_length}: set it to {tokens.shape[1]} (data.sequence_length, --sequence-length)"
            )
        self._tokens = tokens[: config.max_documents]
        _check_ids(path, self._tokens, vocab_size)
        self._training = len(self._tokens) - math.ceil(len(self._tokens) * config.validation_fraction)
        self._last_counts = np.float32(0)

    def counting_all(self) -> "TokenRows":
        """Return the same rows with weight 1 for every token, the last one included, although it has no target."""
        counting = copy.copy(self)
        counting._last_counts = np.float32(1)
        return counting

    def rows(self, split: str, sequence_length: int) -> int:
        """Number of sequences in the split."""
        del sequence_length  # checked when the file was opened
        return self._training if split == TRAIN else len(self._tokens) - self._training

    def row(self, split: str, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a sequence and a filler id, int32 [T + 1], and its targets' weights, float32 [T]: 0 for the filler."""
        sequence = self._tokens[index if split == TRAIN else self._training + index]
        counts = np.ones(sequence_length, dtype=np.float32)
        counts[-1] = self._last_counts
        return np.append(sequence, 0).astype(np.int32), counts

    def describe(self, split: str) -> str:
        """Size of the split, for messages."""
        return f"{self.rows(split, 0):,} rows"


def every_token(source: TokenSource) -> TokenSource:
    """Return the source with weights that count tokens, for statistics of the tokens that a model runs.

    The last token of a row of token ids then counts as well, which has no target.
    """
    return source.counting_all() if isinstance(source, TokenRows) else source


def row_length(source: str) -> int:
    """Tokens in each sequence of a .npy file; UserError when it holds no token ids."""
    return _open(Path(source).expanduser()).shape[1]


def _open(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header is parsed as Python, which raises exceptions of many types
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}): data.source needs an int32 .npy [sequences, T]") from error
    if not isinstance(tokens, np.ndarray):
        tokens.close()
        raise UserError(f"{path} is an archive of arrays: token ids must be one .npy, int32 [sequences, T]")
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or len(tokens) == 0 or tokens.shape[1] < 2:
        raise UserError(
            f"{path} holds {tokens.dtype} {list(tokens.shape)}: token ids must be int32 [sequences, T], with T at "
            "least 2"
        )
    return tokens


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    for start in range(0, len(tokens), CHECKED_ROWS):
        part = tokens[start : start + CHECKED_ROWS]
        for found in (int(part.min()), int(part.max())):
            if not 0 <= found < vocab_size:
                raise UserError(
                    f"{path} holds the token id {found} but model.vocab_size is {vocab_size}: "
                    "use the model that the ids were made for"
                )
