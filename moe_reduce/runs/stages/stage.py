"""The interface of a stage: a model in, a model out, on abstract leaves as well as on arrays."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moe_reduce.core.config import ModelConfig, ReduceConfig
from moe_reduce.data.shards import TokenSource
from moe_reduce.models.model import Model
from moe_reduce.training.job import Job

Originals = list[list[list[int]]]  # for each row of experts, the layer and index of each in the first model


@dataclass(frozen=True)
class StageContext:
    """The reduction that a stage belongs to: all that is known when the stage is planned."""

    run: ReduceConfig
    name: str  # of the stage
    first: ModelConfig  # architecture of the first model, with which the reduction began
    load_first: Callable[[], Model]  # returns the first model; its leaves are abstract when the stage is planned
    load_teacher: Callable[[str], Model]  # returns the model in a directory; abstract when the stage is planned


@dataclass(frozen=True)
class RunContext(StageContext):
    """Context of a stage that runs: also its devices, its text and its directory."""

    mesh: Mesh
    tokens: TokenSource
    directory: Path


@dataclass(frozen=True)
class Result:
    """The model that a stage makes, with its entries for the chain and the summary."""

    model: Model
    kept_experts: Originals | None = None  # None: the stage neither moved nor removed experts
    figures: dict[str, Any] = field(default_factory=lambda: {"tokens": 0})  # for the summary; tokens: those trained on


class Stage(ABC):
    """One stage of a reduction, made from its entry in the configuration."""

    @abstractmethod
    def after(self, model: Model, context: StageContext) -> Result:
        """Apply the stage to abstract leaves; raises UserError when it cannot follow the stages before it."""

    @abstractmethod
    def run(self, model: Model, context: RunContext) -> Result:
        """Apply the stage to arrays."""

    def job(self, model: Model, context: StageContext) -> Job | None:
        """Return the stage's training job on the model's leaves, abstract or arrays; None if it trains nothing."""
        del model, context
        return None
