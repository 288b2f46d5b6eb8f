"""Adapters, and the configuration of a run that trains one."""

from dataclasses import dataclass, field
from typing import Literal

from moe_reduce.core.checks import positive
from moe_reduce.core.data_config import DataConfig
from moe_reduce.core.distill_config import DistillConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.execution import ExecutionConfig
from moe_reduce.core.qat_config import QATConfig
from moe_reduce.core.train_config import BalanceConfig, MeshConfig, TrainConfig


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank changes to some linear maps, trained while the base stays frozen (adapters/)."""

    method: Literal["lora", "rslora", "dora", "skema"] = "lora"
    # comma separated: q, k, v, o, gate, up, down, router, or attention (q,k,v,o) and mlp (gate,up,down); a map may name
    # its layers: k@10+11. In a mixture of experts, gate, up and down are those of every expert.
    targets: str = "q,v"
    layers: str = "all"  # layers of the targets that name none: all | top:L | every:s | numbers such as 3+5
    rank: int | None = None  # r of lora, rslora and dora
    sketch_width: int | None = None  # k of skema
    alpha: float | None = None  # None: the alpha that makes the scale 1
    dropout: float = 0.0  # share of the adapter's inputs that are set to 0 while it trains; not on experts
    projection: Literal["orthonormal", "gaussian", "srht"] = "orthonormal"  # skema
    core: Literal["full", "low_rank"] = "full"  # skema: M, or M = A·B through core_rank
    core_rank: int | None = None
    core_std: float = 0.0  # standard deviation of the initial M; a low-rank core starts from 1e-3 where this is 0
    trainable_sketch: bool = False  # train the projections as well
    stored_projections: bool = False  # write projections with the adapter, do not remake them from the seed
    seed: int = 0


@dataclass(frozen=True)
class AdaptConfig:
    """One adaptation: a base model, the adapter that changes it, and the text or completions that it learns."""

    model: str = ""  # directory of the base, of ours or of Hugging Face
    base_sha256: str | None = None  # expected hash of the base (as in a manifest); recorded when a run starts
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)  # None: every parameter of the base trains
    budget: float | None = None  # share of the base's parameters that the adapter may train; gives rank or sketch_width
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the base; trained parameters are kept in fp32
    test_source: str | None = None  # text on which the finished model is measured, once
    recall_pairs: int = 100  # pairs of each split to complete at every evaluation (completions only)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)  # data.tokenizer=train: the base's own tokenizer
    mesh: MeshConfig = field(default_factory=MeshConfig)
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(loss="none"))
    distill: DistillConfig = field(default_factory=DistillConfig)
    qat: QATConfig = field(default_factory=QATConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(weight_decay=0.0, beta2=0.999))

    def check(self) -> None:
        """Raise UserError at the first key that cannot work; the model's own limits are checked once it is open."""
        if not self.model:
            raise UserError("model is empty: give the directory of the base, --config.model=DIR")
        self._check_budget()
        positive("", self, "recall_pairs")
        if self.test_source is not None and self.data.learns_completions:
            raise UserError("test_source is for text, and this run learns completions: leave it None")
        if self.test_source == "":
            raise UserError("test_source is empty: name a text, or leave it None")
        self.mesh.check()
        self.execution.check()
        self.data.check()
        self.train.check()
        self.balance.check()
        self.distill.check()
        if self.qat.schemes and self.adapter is not None:
            raise UserError("qat.schemes rounds what trains, and an adapter leaves its base frozen: set adapter=None")
        if self.balance.bias_rate > 0:
            raise UserError("balance.bias_rate is for train: in adapt the base stays as it is")

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        positive("", self, "budget")
        if self.adapter is None:
            raise UserError("budget is for an adapter, and adapter is None: everything trains")
        name = "sketch_width" if self.adapter.method == "skema" else "rank"
        if getattr(self.adapter, name) is not None:
            raise UserError(f"budget decides adapter.{name}: leave one of them out")
