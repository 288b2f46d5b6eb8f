"""Configurations of the stages of a reduction, one dataclass for each `kind`."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from moe_reduce.core import schemes
from moe_reduce.core.adapt_config import AdapterConfig
from moe_reduce.core.checks import in_range, positive
from moe_reduce.core.distill_config import DistillConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.model_config import REQUIRED_INT
from moe_reduce.core.train_config import MeshConfig, TrainConfig


@dataclass(frozen=True)
class PoolStage:
    """Merge the experts of all layers into one pool (reduction/pool.py)."""

    kind: Literal["pool"] = "pool"
    canonical: bool = True  # first fold norm scales and output sizes into the experts, so that layers can share them
    start: Literal["lossless", "concat", "random"] = "lossless"
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    router: Literal["shared", "layer"] = "shared"
    bias: float | None = None  # subtracted from logits of foreign experts; None: enough to keep the model exact
    offset: float = 0.0  # subtracted before sigmoid scores

    def check(self, path: str, mesh: MeshConfig, train: TrainConfig) -> None:
        """Accept every combination: its values are limited by their types."""
        del path, mesh, train


@dataclass(frozen=True)
class PruneStage:
    """Score the experts on training text and keep the best."""

    kind: Literal["prune"] = "prune"
    # share of the first model's experts, or their number; every layer keeps equally many, rounded up
    keep: float = 1.0
    criterion: str = "reap"
    protect_super_experts: bool = False
    calibration_batches: int = 16  # batches of train.batch_size sequences
    seed: int = 0  # added to train.seed; decides the batches and the random criterion

    def check(self, path: str, mesh: MeshConfig, train: TrainConfig) -> None:
        """Raise UserError at the first key that cannot work; path: the stage's name in the configuration."""
        del train
        positive(path, self, "keep", "calibration_batches")
        if mesh.tensor > 1:
            raise UserError(
                f"{path} scores experts by their whole outputs, which mesh.tensor={mesh.tensor} splits: "
                "set mesh.tensor=1"
            )


@dataclass(frozen=True)
class TuneStage:
    """Train some components. The schedule is the stage's own; everything else comes from `train`."""

    kind: Literal["tune"] = "tune"
    # language_model: next token (and the teacher's distribution) | router: each layer keeps its choice of experts
    objective: str = "language_model"
    components: str = "router"  # comma separated component names, as `plan` lists them
    adapter: AdapterConfig | None = None  # trains as well, and is merged into the model at the end
    # schemes of quantisation-aware training, as in core/qat_config.py, in which the model is stored at the end
    qat: str = ""
    # distillation, as in core/distill_config.py
    teacher_weight: float = 0.0  # share of KL(teacher ‖ this model) in the loss
    teacher_temperature: float = 1.0
    teacher: str | None = None  # model directory; None: the model that the reduction begins with
    teacher_logits: str | None = None
    bias_from: float | None = None  # selection bias against foreign experts at the first step
    bias_to: float = 0.0  # the same after anneal_share of the steps
    anneal_share: float = 0.8
    steps: int = REQUIRED_INT
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 0

    def schedule(self, train: TrainConfig) -> TrainConfig:
        """Replace the steps and rates of `train` by those of this stage."""
        names = ("steps", "learning_rate", "final_learning_rate", "warmup_steps")
        return dataclasses.replace(train, **{name: getattr(self, name) for name in names})

    def distillation(self, first: str) -> DistillConfig:
        """Return the stage's distillation. first: directory of the model that the reduction begins with."""
        teacher = self.teacher or first
        return DistillConfig(teacher, None, self.teacher_weight, self.teacher_temperature, self.teacher_logits)

    def check(self, path: str, mesh: MeshConfig, train: TrainConfig) -> None:
        """Raise UserError at the first key that cannot work; path: the stage's name in the configuration."""
        del mesh
        self.schedule(train).check_schedule(path)
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(f"{path}.teacher_weight must be from 0 to 1, got {self.teacher_weight}")
        positive(path, self, "teacher_temperature")
        if self.qat and self.adapter is not None:
            raise UserError(f"{path}.qat rounds what trains, and an adapter leaves its base frozen: leave one out")
        _check_schemes(f"{path}.qat", self.qat)
        for name in ("teacher", "teacher_logits"):
            if getattr(self, name) is not None and not (getattr(self, name) and self.teacher_weight):
                raise UserError(f"{path}.{name} needs a value and {path}.teacher_weight above 0: leave it out")
        self._check_annealing(path, train)

    def _check_annealing(self, path: str, train: TrainConfig) -> None:
        in_range(path, self, "anneal_share", 0.0, 1.0001)
        if self.bias_from is None:
            if self.bias_to:
                raise UserError(f"{path}.bias_to needs {path}.bias_from: there is nothing to anneal")
            return
        if not self.bias_from >= self.bias_to >= 0:
            raise UserError(
                f"{path}.bias_from ({self.bias_from}) must fall to {path}.bias_to ({self.bias_to}), 0 or more"
            )
        if train.ema_decay:
            raise UserError(
                f"{path}.bias_from needs train.ema_decay=0: an average would keep the bias that annealing removes"
            )


@dataclass(frozen=True)
class QuantizeStage:
    """Store the matrices in fewer bits, rounded to nearest (quantization/)."""

    kind: Literal["quantize"] = "quantize"
    scheme: str = "int8"  # such as int4,attention=int8,embedding=keep; see the command quantize
    keep: str = "router,norm"  # comma separated components that stay unless `scheme` names them
    clip: Literal["min-max", "percentile", "mse"] = "min-max"  # range that the values of a scale cover

    def check(self, path: str, mesh: MeshConfig, train: TrainConfig) -> None:
        """Raise UserError for a scheme that is unknown; path: the stage's name in the configuration."""
        del mesh, train
        _check_schemes(f"{path}.scheme", self.scheme)


def _check_schemes(key: str, text: str) -> None:
    """Raise UserError for a scheme that is unknown. key: names the text in the configuration."""
    usual, named = schemes.split(text)
    for name in (usual, *named.values()):
        if name not in (None, schemes.KEEP):
            try:
                schemes.parse(name)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None


StageConfig = PoolStage | PruneStage | TuneStage | QuantizeStage
STAGES = {configuration.kind: configuration for configuration in typing.get_args(StageConfig)}  # by kind
