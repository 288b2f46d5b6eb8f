"""Consistency of a configuration: every refusal is one line that names the key and the remedy."""

import math
from typing import TYPE_CHECKING, Any

from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.core.config import (
        AdaptConfig,
        BalanceConfig,
        DataConfig,
        ExecutionConfig,
        GenerateConfig,
        MeshConfig,
        ModelConfig,
        MoEConfig,
        ReduceConfig,
        RunConfig,
        Stage,
        TrainConfig,
        TuneStage,
    )


def positive(section: str, config: Any, *names: str) -> None:
    """Raises UserError at the first of the named attributes that is not above zero."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:  # refuses nan as well
            key = f"{section}.{name}" if section else name
            raise UserError(f"{key} must be positive, got {getattr(config, name)}")


def _in_range(section: str, config: Any, name: str, low: float, high: float) -> None:
    if not low <= getattr(config, name) < high:
        raise UserError(f"{section}.{name} must be at least {low} and below {high}, got {getattr(config, name)}")


def check_run(run: "RunConfig") -> None:
    """Raises UserError at the first key that cannot work."""
    check_model(run.model)
    _check_execution(run.execution)
    if not run.execution.expert_gradients:
        raise UserError("execution.expert_gradients=False would train everything but the experts: leave it to reduce")
    check_data(run.data)
    check_mesh(run.mesh, run.model)
    _check_train(run.train)
    _check_balance(run.balance)
    if run.balance.bias_rate > 0 and not (run.model.moe and run.model.moe.selection_bias):
        raise UserError("balance.bias_rate needs model.moe.selection_bias=True: there is no bias to move")


def check_reduce(run: "ReduceConfig") -> None:
    """Raises UserError at the first key that cannot work; what depends on the model is checked when it is open."""
    if not run.model:
        raise UserError("model is empty: give the directory of a mixture of experts, --config.model=DIR")
    if not run.stages:
        raise UserError("stages is empty: nothing would be done to the model")
    _check_sizes(run.mesh)
    _check_shared(run.train)
    if run.architecture is not None:
        check_model(run.architecture)
    _check_execution(run.execution)
    check_data(run.data)
    _check_balance(run.balance)
    if run.balance.bias_rate > 0:
        raise UserError("balance.bias_rate is for train: in reduce the selection bias belongs to the pool")
    for name, stage in run.stages.items():
        if not name.replace("_", "").isalnum():
            raise UserError(f"stages.{name}: a stage's name is made of letters, digits and underscores")
        _check_stage(f"stages.{name}", stage, run)


def check_adapt(run: "AdaptConfig") -> None:
    """Raises UserError at the first key that cannot work; what depends on the model is checked when it is open."""
    if not run.model:
        raise UserError("model is empty: give the directory of the base, --config.model=DIR")
    if run.budget is not None:
        positive("", run, "budget")
        if run.adapter is None:
            raise UserError("budget is for an adapter, and adapter is None: everything trains")
        name = "sketch_width" if run.adapter.method == "skema" else "rank"
        if getattr(run.adapter, name) is not None:
            raise UserError(f"budget decides adapter.{name}: leave one of them out")
    positive("", run, "recall_pairs")
    if run.test_source is not None and _is_completions(run.data):
        raise UserError("test_source is for text, and this run learns completions: leave it None")
    if run.test_source == "":
        raise UserError("test_source is empty: name a text, or leave it None")
    _check_sizes(run.mesh)
    _check_execution(run.execution)
    check_data(run.data)
    _check_train(run.train)
    _check_balance(run.balance)
    if run.balance.bias_rate > 0:
        raise UserError("balance.bias_rate is for train: in adapt the base stays as it is")


def check_generate(settings: "GenerateConfig") -> None:
    """Raises UserError at the first number that is out of range."""
    positive("", settings, "max_tokens", "top_p", *(() if settings.top_k is None else ("top_k",)))
    if settings.top_p > 1:
        raise UserError(f"top_p must be at most 1, got {settings.top_p}")
    if not 0 <= settings.temperature < math.inf:
        raise UserError(f"temperature must be 0 (the most probable token) or above, got {settings.temperature}")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"seed must be at least 0 and below 2**32, got {settings.seed}")


def _check_stage(path: str, stage: "Stage", run: "ReduceConfig") -> None:
    if stage.kind == "prune":
        positive(path, stage, "keep", "calibration_batches")
        if run.mesh.tensor > 1:
            raise UserError(
                f"{path} scores experts by their whole outputs, which mesh.tensor={run.mesh.tensor} splits: "
                "set mesh.tensor=1"
            )
    if stage.kind == "tune":
        _check_tune(path, stage, run)


def _check_tune(path: str, stage: "TuneStage", run: "ReduceConfig") -> None:
    _check_schedule(path, stage)
    _in_range(path, stage, "anneal_share", 0.0, 1.0001)
    if not 0 <= stage.teacher_weight <= 1:
        raise UserError(f"{path}.teacher_weight must be from 0 to 1, got {stage.teacher_weight}")
    if stage.bias_from is None and stage.bias_to:
        raise UserError(f"{path}.bias_to needs {path}.bias_from: there is nothing to anneal")
    if stage.bias_from is not None and not stage.bias_from >= stage.bias_to >= 0:
        raise UserError(
            f"{path}.bias_from ({stage.bias_from}) must fall to {path}.bias_to ({stage.bias_to}), 0 or more"
        )
    if stage.bias_from is not None and run.train.ema_decay:
        raise UserError(
            f"{path}.bias_from needs train.ema_decay=0: an average would keep the bias that annealing takes"
        )
    if stage.objective == "router" and stage.teacher_weight:
        raise UserError(f"{path}.teacher_weight is for objective=language_model")
    if stage.objective == "router" and stage.adapter is not None:
        raise UserError(f"{path}.adapter learns nothing from objective=router: leave it out")
    if stage.objective == "router" and stage.components != "router":
        raise UserError(f"{path}.objective=router trains routers only: set {path}.components=router")


def check_model(model: "ModelConfig") -> None:
    """Raises UserError when the sizes contradict each other."""
    positive(
        "model", model, "vocab_size", "layers", "width", "query_heads", "key_value_heads", "head_width",
        "rope_theta", "norm_epsilon", "max_positions", "init_std",
    )  # fmt: skip
    if model.query_heads % model.key_value_heads:
        raise UserError(
            f"model.query_heads ({model.query_heads}) must be a multiple of model.key_value_heads "
            f"({model.key_value_heads})"
        )
    _check_rotary(model)
    if model.clip_qkv is not None:
        positive("model", model, "clip_qkv")
    if model.embedding_factor is not None:
        positive("model", model, "embedding_factor")
        if not model.tied_embeddings:
            raise UserError("model.embedding_factor needs model.tied_embeddings=True: the factors serve both ends")
    if (model.moe is None) == (model.feed_forward_width is None):
        raise UserError("give exactly one of model.feed_forward_width (dense) and model.moe (experts)")
    if model.feed_forward_width is not None:
        positive("model", model, "feed_forward_width")
    if model.moe is not None:
        _check_beside_experts(model)
        _check_moe(model.moe)


def _check_rotary(model: "ModelConfig") -> None:
    if model.head_width % 2:
        raise UserError(f"model.head_width must be even for rotary embeddings, got {model.head_width}")
    if not 0 < model.rotary_share <= 1:
        raise UserError(f"model.rotary_share must be above 0 and at most 1, got {model.rotary_share}")
    rotated = int(model.rotary_share * model.head_width)
    if rotated == 0 or rotated % 2:
        raise UserError(
            f"model.rotary_share={model.rotary_share} turns {rotated} of the {model.head_width} numbers of a head: "
            "choose a share that makes this even and above 0"
        )


def _check_beside_experts(model: "ModelConfig") -> None:
    for name, only in (("feed_forward", "swiglu"), ("biases", False), ("norm", "rms")):
        if getattr(model, name) != only:
            raise UserError(f"model.{name}={getattr(model, name)} is for dense models: with model.moe set it to {only}")


def _check_moe(moe: "MoEConfig") -> None:
    positive("model.moe", moe, "experts", "active", "width", "init_scale")
    if moe.active > moe.experts:
        raise UserError(f"model.moe.active ({moe.active}) must not exceed model.moe.experts ({moe.experts})")
    if moe.router == "shared" and moe.placement == "layer":
        raise UserError("model.moe.router=shared needs model.moe.placement=shared: a router names experts of one pool")


def _check_execution(execution: "ExecutionConfig") -> None:
    positive("execution", execution, "capacity_factor", "block_rows", "scan_unroll")


def check_kernels(execution: "ExecutionConfig", default_platform: str) -> None:
    """Raises UserError for a resolved way to compute that the devices which jax sees do not have."""
    if execution.attention == "cudnn" and (execution.platform != "gpu" or execution.compute_dtype != "bfloat16"):
        raise UserError("execution.attention=cudnn is for GPUs and execution.compute_dtype=bfloat16: leave it at auto")
    if execution.attention == "splash" and default_platform != "tpu":
        raise UserError(f"execution.attention=splash is for TPUs, but jax sees {default_platform} alone")
    if execution.dispatch == "grouped" and default_platform != "gpu":
        raise UserError(f"experts on a GPU (execution.dispatch=grouped), but jax sees {default_platform} alone")


def check_data(data: "DataConfig") -> None:
    """Raises UserError at the first key that cannot work."""
    positive("data", data, "sequence_length", "workers", *(() if data.max_documents is None else ("max_documents",)))
    _in_range("data", data, "validation_fraction", 0.0, 1.0)
    if not data.source:
        raise UserError("data.source is empty: give python-stdlib, a path or glob, hub:NAME, or a .npy file")
    if data.validation_source is not None:
        _check_text("data.validation_source", data.validation_source)
        if _is_completions(data) or data.source.endswith(".npy"):
            raise UserError("data.validation_source is for text: rows are divided by data.validation_fraction")
    if data.completion_field is not None and data.source.endswith(".npy"):
        raise UserError("data.completion_field is of rows of text, and data.source holds token ids: leave it None")


def _is_completions(data: "DataConfig") -> bool:
    return data.completion_field is not None or data.source.startswith("uuid-pairs:")


def _check_text(key: str, source: str) -> None:
    if not source or source.endswith(".npy") or source.startswith("uuid-pairs:"):
        raise UserError(f"{key}={source!r} must name text, by a path or glob, python-stdlib or hub:NAME")


def check_mesh(mesh: "MeshConfig", model: "ModelConfig", tensor: str = "mesh.tensor") -> None:
    """Raises UserError when the sizes of a model do not divide over a mesh. tensor: what its user calls that size."""
    _check_sizes(mesh)
    if model.moe is not None and model.moe.experts % mesh.expert:
        raise UserError(f"model.moe.experts ({model.moe.experts}) must be a multiple of mesh.expert ({mesh.expert})")
    if model.moe is None and mesh.expert > 1:
        raise UserError(f"mesh.expert={mesh.expert} needs experts, but model.moe is None: set mesh.expert=1")
    for name in ("query_heads", "key_value_heads", "feed_forward_width"):
        size = getattr(model, name)
        if size is not None and size % mesh.tensor:
            raise UserError(f"model.{name} ({size}) must be a multiple of {tensor} ({mesh.tensor})")
    if model.width % (mesh.fsdp * mesh.expert):
        parts = f"mesh.fsdp · mesh.expert ({mesh.fsdp} · {mesh.expert})"
        raise UserError(f"model.width ({model.width}) must be a multiple of {parts}")


def _check_sizes(mesh: "MeshConfig") -> None:
    positive("mesh", mesh, "fsdp", "expert", "tensor")
    if mesh.data != -1:
        positive("mesh", mesh, "data")


def _check_train(train: "TrainConfig") -> None:
    _check_shared(train)
    _check_schedule("train", train)


def _check_shared(train: "TrainConfig") -> None:
    """All but the schedule, of which each stage of a reduction has its own."""
    positive(
        "train", train, "batch_size", "accumulation", "epsilon", "clip_norm", "log_every", "evaluate_every",
        "evaluate_batches", "checkpoint_every", "checkpoints_kept", "expert_learning_rate_scale",
    )  # fmt: skip
    for name in ("beta1", "beta2", "ema_decay"):
        _in_range("train", train, name, 0.0, 1.0)
    _in_range("train", train, "weight_decay", 0.0, float("inf"))
    _in_range("train", train, "seed", 0, 2**32)
    if train.batch_size % train.accumulation:
        raise UserError(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.accumulation ({train.accumulation})"
        )


def _check_schedule(path: str, schedule: "TrainConfig | TuneStage") -> None:
    positive(path, schedule, "steps", "learning_rate")
    for name in ("final_learning_rate", "warmup_steps"):
        _in_range(path, schedule, name, 0.0, float("inf"))
    if schedule.final_learning_rate > schedule.learning_rate:
        raise UserError(
            f"{path}.final_learning_rate ({schedule.final_learning_rate}) must not exceed {path}.learning_rate "
            f"({schedule.learning_rate}), from which it decays: set both"
        )
    if schedule.warmup_steps >= schedule.steps:
        raise UserError(f"{path}.warmup_steps ({schedule.warmup_steps}) must be below {path}.steps ({schedule.steps})")


def _check_balance(balance: "BalanceConfig") -> None:
    for name in ("weight", "z_loss_weight", "bias_rate", "entropy_floor", "dead_share_limit"):
        _in_range("balance", balance, name, 0.0, float("inf"))
