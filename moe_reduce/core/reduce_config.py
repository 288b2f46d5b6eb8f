"""Configuration of a reduction: a model and the stages that make it smaller."""

from dataclasses import dataclass, field
from typing import Literal

from moe_reduce.core.data_config import DataConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.execution import ExecutionConfig
from moe_reduce.core.model_config import ModelConfig
from moe_reduce.core.stages import STAGES, StageConfig
from moe_reduce.core.train_config import BalanceConfig, MeshConfig, TrainConfig


@dataclass(frozen=True)
class ReduceConfig:
    """One reduction: a model directory and the stages applied to it."""

    model: str = ""  # directory of a mixture of experts, of ours or of Hugging Face
    architecture: ModelConfig | None = None  # expected architecture of `model`; lets `plan` work without the weights
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the parameters; trained ones are kept in fp32
    order: str = ""  # names of the stages to run, comma separated, because a ConfigDict sorts its keys
    # by name; once the configuration is read, only those of `order`, in that order
    stages: dict[str, StageConfig] = field(default_factory=dict, metadata={"kinds": STAGES})
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)  # data.tokenizer=train: the model's own tokenizer
    mesh: MeshConfig = field(default_factory=MeshConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """Raise UserError at the first key that cannot work; the model's own limits are checked once it is open."""
        if not self.model:
            raise UserError("model is empty: give the directory of a mixture of experts, --config.model=DIR")
        if not self.stages:
            raise UserError("stages is empty: nothing would be done to the model")
        self.mesh.check()
        self.train.check_constants()
        if self.train.epochs is not None:
            raise UserError("train.epochs is for train and adapt: in reduce set the steps of each stage")
        if self.architecture is not None:
            self.architecture.check()
        self.execution.check()
        self.data.check()
        self.balance.check()
        if self.balance.bias_rate > 0:
            raise UserError("balance.bias_rate is for train: in reduce the selection bias belongs to the pool")
        for name, stage in self.stages.items():
            if not name.replace("_", "").isalnum():
                raise UserError(f"stages.{name}: a stage's name is made of letters, digits and underscores")
            stage.check(f"stages.{name}", self.mesh, self.train)
