"""Token ids from a .npy file of whole sequences, with the interface of a prepared corpus."""

import math
from pathlib import Path

import numpy as np

from moe_reduce.core.config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.data.pieces import TRAIN

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
        self._tokens = _open(path, config.sequence_length)[: config.max_documents]
        _check_ids(path, self._tokens, vocab_size)
        self._training = len(self._tokens) - math.ceil(len(self._tokens) * config.validation_fraction)

    def rows(self, split: str, sequence_length: int) -> int:
        """Number of sequences in the split."""
        del sequence_length  # checked when the file was opened
        return self._training if split == TRAIN else len(self._tokens) - self._training

    def row(self, split: str, index: int, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Read a sequence and a filler id, int32 [T + 1], and its targets' weights, float32 [T]: 0 for the filler."""
        sequence = self._tokens[index if split == TRAIN else self._training + index]
        counts = np.ones(sequence_length, dtype=np.float32)
        counts[-1] = 0
        return np.append(sequence, 0).astype(np.int32), counts

    def describe(self, split: str) -> str:
        """Size of the split, for messages."""
        return f"{self.rows(split, 0):,} rows"


def _open(path: Path, sequence_length: int) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): data.source needs an int32 .npy [sequences, T]") from error
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or len(tokens) == 0:
        raise UserError(f"{path} holds {tokens.dtype} {list(tokens.shape)}: token ids must be int32 [sequences, T]")
    if tokens.shape[1] != sequence_length:
        raise UserError(
            f"{path} has sequences of {tokens.shape[1]} tokens but data.sequence_length is {sequence_length}: "
            f"set it to {tokens.shape[1]} (data.sequence_length, --sequence-length)"
        )
    return tokens


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    for start in range(0, len(tokens), CHECKED_ROWS):
        block = tokens[start : start + CHECKED_ROWS]
        for found in (int(block.min()), int(block.max())):
            if not 0 <= found < vocab_size:
                raise UserError(
                    f"{path} holds the token id {found} but model.vocab_size is {vocab_size}: "
                    "use the model that the ids were made for"
                )
