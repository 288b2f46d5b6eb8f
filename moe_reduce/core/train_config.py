"""Mesh, balancing and optimisation, and the configuration of a pretraining run."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from moe_reduce.core.checks import in_range, positive
from moe_reduce.core.data_config import DataConfig
from moe_reduce.core.distill_config import DistillConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.execution import ExecutionConfig
from moe_reduce.core.model_config import REQUIRED_INT, ModelConfig
from moe_reduce.core.qat_config import QATConfig


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; data = -1 takes all that the other axes leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def check(self) -> None:
        """Raise UserError when an axis has no device."""
        positive("mesh", self, "fsdp", "expert", "tensor")
        if self.data != -1:
            positive("mesh", self, "data")

    def check_fits(self, model: ModelConfig, tensor: str = "mesh.tensor") -> None:
        """Raise UserError when a model's sizes do not divide over the mesh. tensor: what messages call that axis."""
        self.check()
        if model.moe is not None and model.moe.experts % self.expert:
            raise UserError(
                f"model.moe.experts ({model.moe.experts}) must be a multiple of mesh.expert ({self.expert})"
            )
        if model.moe is None and self.expert > 1:
            raise UserError(f"mesh.expert={self.expert} needs experts, but model.moe is None: set mesh.expert=1")
        for name in ("query_heads", "key_value_heads", "feed_forward_width"):
            size = getattr(model, name)
            if size is not None and size % self.tensor:
                raise UserError(f"model.{name} ({size}) must be a multiple of {tensor} ({self.tensor})")
        if model.width % (self.fsdp * self.expert):
            parts = f"mesh.fsdp · mesh.expert ({self.fsdp} · {self.expert})"
            raise UserError(f"model.width ({model.width}) must be a multiple of {parts}")


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing of experts (GShard arXiv:2006.16668, ST-MoE arXiv:2202.08906, loss-free arXiv:2408.15664)."""

    loss: Literal["none", "pooled", "per_call"] = "pooled"  # over all layers together | per layer, then averaged
    weight: float = 0.01
    z_loss_weight: float = 0.0
    bias_rate: float = 0.0  # step of the loss-free selection bias; needs model.moe.selection_bias
    bias_scope: Literal["pooled", "per_call"] = "pooled"  # counts that the loss-free bias evens out
    # Training stops as collapsed when a logged step crosses one of these two limits.
    entropy_floor: float = 0.0  # lowest entropy of expert use; 0: all tokens choose the same, 1: even use
    dead_share_limit: float = 1.0  # largest share of experts that get under a tenth of the mean use

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        for name in ("weight", "z_loss_weight", "bias_rate", "entropy_floor", "dead_share_limit"):
            in_range("balance", self, name, 0.0, float("inf"))


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation (AdamW, linear warm-up, then decay) and the intervals of logs, evaluations and checkpoints."""

    steps: int = REQUIRED_INT  # or epochs
    epochs: float | None = None  # passes over the training text, in place of steps
    batch_size: int = REQUIRED_INT  # sequences a step, over all devices
    accumulation: int = 1  # micro-batches a step
    learning_rate: float = 3e-4
    final_learning_rate: float = 3e-5
    warmup_steps: int = 0
    decay: Literal["cosine", "linear"] = "cosine"  # from learning_rate to final_learning_rate, after the warm-up
    expert_learning_rate_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # 0: off; otherwise evaluation and the result use the average
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 100
    evaluate_batches: int = 8
    checkpoint_every: int = 100
    checkpoints_kept: int = 2

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        self.check_constants()
        self.check_schedule("train")

    def check_constants(self) -> None:
        """Raise UserError at the first wrong key outside the schedule (each stage of a reduction has its own)."""
        positive(
            "train", self, "batch_size", "accumulation", "epsilon", "clip_norm", "log_every", "evaluate_every",
            "evaluate_batches", "checkpoint_every", "checkpoints_kept", "expert_learning_rate_scale",
        )  # fmt: skip
        for name in ("beta1", "beta2", "ema_decay"):
            in_range("train", self, name, 0.0, 1.0)
        in_range("train", self, "weight_decay", 0.0, float("inf"))
        in_range("train", self, "seed", 0, 2**32)
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size ({self.batch_size}) must be a multiple of train.accumulation ({self.accumulation})"
            )

    def check_schedule(self, path: str) -> None:
        """Raise UserError when steps and learning rates contradict each other. path: the name of their group."""
        positive(path, self, "learning_rate", *(["steps"] if self.epochs is None else ["epochs"]))
        if self.epochs is not None and self.steps:
            raise UserError(
                f"{path}.steps ({self.steps}) and {path}.epochs ({self.epochs}) both say how long to train: choose one "
                f"({path}.steps=0 leaves it to epochs)"
            )
        for name in ("final_learning_rate", "warmup_steps"):
            in_range(path, self, name, 0.0, float("inf"))
        if self.final_learning_rate > self.learning_rate:
            raise UserError(
                f"{path}.final_learning_rate ({self.final_learning_rate}) must not exceed {path}.learning_rate "
                f"({self.learning_rate}), from which it decays: set both"
            )
        if self.epochs is None and self.warmup_steps >= self.steps:
            raise UserError(f"{path}.warmup_steps ({self.warmup_steps}) must be below {path}.steps ({self.steps})")

    def over(self, sequences: int) -> "TrainConfig":
        """The same schedule in steps, with an epoch of so many sequences; the last step may begin a further epoch.

        Raises UserError when the warm-up takes all of it.
        """
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * sequences / self.batch_size)
        if self.warmup_steps >= steps:
            raise UserError(
                f"train.warmup_steps ({self.warmup_steps}) must be below train.epochs ({self.epochs}), which here are "
                f"{steps} steps: lower the one or raise the other"
            )
        return dataclasses.replace(self, steps=steps, epochs=None)


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    qat: QATConfig = field(default_factory=QATConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        self.model.check()
        self.execution.check()
        if not self.execution.expert_gradients:
            raise UserError(
                "execution.expert_gradients=False would train everything but the experts: leave it to reduce"
            )
        self.data.check()
        self.mesh.check_fits(self.model)
        self.train.check()
        self.balance.check()
        self.distill.check()
        if self.balance.bias_rate > 0 and not (self.model.moe and self.model.moe.selection_bias):
            raise UserError("balance.bias_rate needs model.moe.selection_bias=True: there is no bias to move")
