"""Greedy decoding of one text as `moe-reduce generate` does it, for the benchmarks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = list(range(1, 17))
FLOATS = ("float32", "bfloat16")


class Decoder:
    """A model that is ready to decode. kind: a dtype to compute in, or the scheme to round the weights to."""

    def __init__(self, directory: Path, kind: str, tokens: int):
        """Loads the model. tokens: of a text."""
        import moe_reduce
        from moe_reduce.core.config import ExecutionConfig, GenerateConfig
        from moe_reduce.core.schemes import parse
        from moe_reduce.inference.generate import ready
        from moe_reduce.quantization.round_to_nearest import every_component, quantise

        dtype = kind if kind in FLOATS else "float32"
        model = moe_reduce.load(directory, execution=ExecutionConfig(compute_dtype=dtype).resolve("cpu"))
        if kind not in FLOATS:
            model = quantise(model, every_component(model.config, parse(kind)))
        self._model, self._settings = ready(model), GenerateConfig(max_tokens=tokens)

    def chunks(self) -> Iterator[list[list[int]]]:
        """The first token of a text, and then the others, some at a time."""
        from moe_reduce.inference.generate import chunks

        return chunks(self._model, [PROMPT], self._settings)

    def run(self) -> None:
        """Makes one text."""
        for _ in self.chunks():
            pass

    def facts(self) -> dict[str, Any]:
        """Bytes of the weights in memory."""
        import jax

        return {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._model.params))}
