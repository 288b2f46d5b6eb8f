"""Embeddings by which a hypernetwork knows a task: of its descriptions, of its number, or both side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.adapters.hypernetwork.directory import Trained
from moe_reduce.adapters.hypernetwork.encoders import Encoder, OneHot, open_encoder
from moe_reduce.adapters.hypernetwork.tasks import DescribedTask


class Conditioning:
    """Embeddings of tasks. encoder: of descriptions, or None; numbered: names of the tasks that have a number."""

    def __init__(self, encoder: Encoder | None, numbered: Sequence[str]):
        assert encoder or numbered
        self._encoder, self._numbers = encoder, OneHot(numbered)

    def embeddings(self, task: DescribedTask) -> np.ndarray:
        """Embeddings of a task, fp32 [K, W]: one for each description. An unknown task has zeros for its number."""
        known = task.name in self._numbers
        number = self._numbers.encode([task.name]) if known else np.zeros((1, self._numbers.width), np.float32)
        if self._encoder is None:
            return number
        text_KW = self._encoder.encode(task.descriptions)
        return np.concatenate([text_KW, np.repeat(number, len(text_KW), axis=0)], axis=1)

    def entry(self) -> dict[str, Any]:
        """Entry in a hypernetwork's config.json: names, hashes and the total width."""
        parts = [*([] if self._encoder is None else [self._encoder]), *([self._numbers] if self._numbers.width else [])]
        return {
            "name": "+".join(part.name for part in parts),
            "sha256": "+".join(part.hash for part in parts),
            "width": sum(part.width for part in parts),
        }


def of_trained(trained: Trained, cache: Path) -> Conditioning:
    """The conditioning with which a hypernetwork was trained. Raises UserError if its encoder has changed."""
    name = trained.encoder["name"]
    text = name.removesuffix(OneHot.name).removesuffix("+")
    found = Conditioning(open_encoder(text, cache) if text else None, trained.tasks if text != name else ())
    trained.check_encoding(found.entry())
    return found
