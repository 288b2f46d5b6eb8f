"""Configuration of the runs of Text-to-LoRA: oracle adapters, and hypernetworks that write adapters."""

from dataclasses import dataclass, field
from typing import Literal

from moe_reduce.core.checks import in_range, positive
from moe_reduce.core.errors import UserError
from moe_reduce.core.execution import ExecutionConfig
from moe_reduce.core.hypernetwork_config import HypernetworkConfig
from moe_reduce.core.train_config import MeshConfig, TrainConfig


@dataclass(frozen=True)
class TasksConfig:
    """Tasks in the format of Super-NaturalInstructions, divided into training, validation and unseen ones."""

    directory: str = ""
    wordings: str | None = None  # JSON file {task: [description, ...]} with more descriptions
    splits: str | None = None  # JSON file {train, validation, unseen: [task, ...]}; None: drawn by seed
    train: int | None = None  # most training tasks; None: all
    validation: int = 8  # tasks that are drawn for validation, and as unseen ones
    unseen: int = 16
    seed: int = 0  # of the drawn splits and of the held-out instances
    descriptions: int = 128  # most wordings of a task's description
    instances: int | None = None  # most instances of a task; None: all
    held_out: int = 32  # instances of each task that never train
    # tokens of prompt, completion and end of text; longer instances are left out, and tasks with too few short ones
    sequence_length: int = 256
    cache: str = "runs/embeddings"  # of descriptions

    def check(self) -> None:
        """Raise UserError at the first key that cannot work."""
        if not self.directory:
            raise UserError("tasks.directory is empty: give a directory of tasks, --config.tasks.directory=DIR")
        positive("tasks", self, "descriptions", "held_out", "sequence_length")
        for name in ("validation", "unseen", "seed"):
            in_range("tasks", self, name, 0, float("inf"))
        for name in ("train", "instances"):
            if getattr(self, name) is not None:
                positive("tasks", self, name)


@dataclass(frozen=True)
class TextToLoraConfig:
    """One run: adapters of tasks, or a hypernetwork that reconstructs such adapters or learns the tasks."""

    model: str = ""  # directory of the base, or a .gguf file
    base_sha256: str | None = None  # expected hash of the base; recorded when a run starts
    # oracles: one adapter for each task, all trained at once | multitask: one adapter for all tasks | reconstruction: a
    # hypernetwork copies a library of oracles | supervised: it learns the tasks' completions through the frozen base
    objective: Literal["oracles", "multitask", "reconstruction", "supervised"] = "supervised"
    split: Literal["train", "validation", "unseen"] = "train"  # tasks whose oracles are trained
    conditioning: Literal["text", "one_hot", "both"] = "text"  # text: embedded descriptions; one_hot: task numbers
    library: str | None = None  # workdir of an oracles run, which reconstruction reads
    target: Literal["factors", "product"] = "factors"  # reconstruction's L1: of z-scored factors | of each ΔW
    rows_per_task: int = 1  # rows of a batch that have the same task
    label_smoothing: float = 0.1
    embedding_noise: float = 5.0  # α of NEFTune (arXiv:2310.05914)
    adapter_penalty: float = 1e-3  # weight of the mean squares of the emitted leaves
    generated_tokens: int = 32  # longest answer when tasks are measured by generation; 0: measure losses only
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the base
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # of the source (arXiv:2506.06105)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            learning_rate=2.5e-5, final_learning_rate=0.0, decay="linear", weight_decay=1e-2, beta2=0.999
        )
    )

    def check(self) -> None:
        """Raise UserError at the first key that cannot work; what depends on the base is checked once it is open."""
        if not self.model:
            raise UserError("model is empty: give the base, --config.model=DIR")
        positive("", self, "rows_per_task")
        for name in ("label_smoothing", "embedding_noise", "adapter_penalty", "generated_tokens"):
            in_range("", self, name, 0.0, 1.0 if name == "label_smoothing" else float("inf"))
        self.hypernetwork.check()
        self.tasks.check()
        self.execution.check()
        self.mesh.check()
        self.train.check()
        if self.train.epochs is not None:
            raise UserError("train.epochs is for running text: set train.steps")
        self._check_objective()

    def _check_objective(self) -> None:
        if (self.library is not None) != (self.objective == "reconstruction"):
            raise UserError(
                "library is the workdir of an oracles run, and belongs to objective=reconstruction: set both or none"
            )
        if self.objective != "oracles" and self.split != "train":
            raise UserError(f"split={self.split} is for objective=oracles: all else trains on split=train")
        if self.objective == "oracles" and self.train.accumulation > 1:
            raise UserError("train.accumulation must be 1 for oracles: each step averages the loss of each task")
        if self.train.batch_size % self.rows_per_task:
            raise UserError(
                f"train.batch_size ({self.train.batch_size}) must be a multiple of rows_per_task ({self.rows_per_task})"
            )
