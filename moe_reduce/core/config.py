"""Frozen dataclasses of a run, their defaults (here and nowhere else), and the only reader of a ConfigDict.

A file in configs/ starts from `base()`, which holds every key with its default, and sets what differs. `parse` turns
the result into dataclasses; an unknown, missing or ill-typed key is a UserError that names it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import ml_collections

from moe_reduce.core import config_dict, validation
from moe_reduce.core.errors import UserError

T = TypeVar("T")
REQUIRED_INT = 0  # the default of sizes that have no sensible default; validation refuses it by name
DISPATCH_BY_PLATFORM = {"cpu": "blocks", "gpu": "grouped", "tpu": "ragged"}
ATTENTION_BY_PLATFORM = {"cpu": "blocks", "gpu": "xla", "tpu": "splash"}


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of the feed-forward block. E experts of width F, A of them active for a token."""

    experts: int = REQUIRED_INT
    active: int = REQUIRED_INT
    width: int = REQUIRED_INT
    placement: Literal["layer", "shared"] = "layer"  # each layer owns E experts | one pool of E serves every layer
    router: Literal["layer", "shared"] = "layer"  # a shared router needs a shared pool
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # renormalise the weights over the chosen (norm_topk_prob)
    selection_bias: bool = False  # [N, E], added for the choice only; moved by loss-free balancing and by pooling
    score_offset: bool = False  # [N], subtracted from the logits of a layer before they are scored (pooling, sigmoid)
    output_gain: bool = False  # [N, D], multiplies what the experts add to the residual of each layer
    init_scale: float = 1.0  # of the experts' initial weights, relative to the dense block's


@dataclass(frozen=True)
class ModelConfig:
    """What the parameters are. Letters as in moe_reduce.models: V, D, N, H, G, C, F, K."""

    vocab_size: int = REQUIRED_INT
    layers: int = REQUIRED_INT
    width: int = REQUIRED_INT
    query_heads: int = REQUIRED_INT
    key_value_heads: int = REQUIRED_INT
    head_width: int = REQUIRED_INT
    feed_forward_width: int | None = None  # dense models; None when `moe` is given
    moe: MoEConfig | None = None
    embedding_factor: int | None = None  # K of E = U·W (ALBERT, arXiv:1909.11942); None: a full table
    tied_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm_scope: Literal["head", "projection"] = "head"  # each head by itself | all heads of a token together
    clip_qkv: float | None = None  # queries, keys and values are clipped to ±this, after their norm
    norm: Literal["rms", "layer"] = "rms"  # layer: LayerNorm, with a bias
    biases: bool = False  # of every linear map in attention and feed-forward
    parallel_residual: bool = False  # attention and feed-forward read the same x, and both are added to it
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"  # gelu: two matrices, exact erf
    rotary_share: float = 1.0  # of a head's width, from its start; the rest carries no position
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    max_positions: int = 2048  # context length the model is meant for; only written to config.json
    init_std: float = 0.02
    # Family whose config.json and tensor names describe the model on disk (families/); None: the first that can. Two
    # configs that differ in it alone are the same architecture, and compare equal.
    family: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ExecutionConfig:
    """How the parameters are computed with: never changes what a checkpoint means."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # auto: resolved once, when a command starts
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "blocks", "cudnn", "splash"] = "auto"  # auto: by platform
    products: Literal["auto", "plain", "transposed"] = "auto"  # auto: transposed for bf16 on CPU (models/products.py)
    dispatch: Literal["auto", "blocks", "ragged", "grouped", "capacity", "reference"] = "auto"  # auto: by platform
    exchange: Literal["auto", "gather", "all_to_all"] = (
        "auto"  # over mesh.expert (models/moe/exchange.py); auto: less sent
    )
    capacity_factor: float = 2.0  # of the capacity dispatch only: rows per expert / mean rows per expert
    block_rows: int = 64  # at most, of the blocks dispatch only
    expert_gradients: bool = True  # False: experts are frozen, and their gradient is not even computed (set by tuning)
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1  # layers unrolled in the scan; their number is fastest on CPU and GPU, and longest to compile

    def resolve(self, default_platform: str) -> "ExecutionConfig":
        """No `auto` left: commands call this once, so that no model code ever looks up a backend.

        Raises UserError for what the platform does not have.
        """
        platform = default_platform if self.platform == "auto" else self.platform
        if platform not in DISPATCH_BY_PLATFORM:
            raise UserError(f"no dispatch is known for platform {platform!r}: set execution.platform and .dispatch")
        dispatch = DISPATCH_BY_PLATFORM[platform] if self.dispatch == "auto" else self.dispatch
        bf16_on_cpu = platform == "cpu" and self.compute_dtype == "bfloat16"
        products = ("transposed" if bf16_on_cpu else "plain") if self.products == "auto" else self.products
        attention = self.attention
        if attention == "auto":  # a kernel of a TPU needs one
            attention = "xla" if platform == "tpu" != default_platform else ATTENTION_BY_PLATFORM[platform]
        found = {"platform": platform, "attention": attention, "products": products, "dispatch": dispatch}
        resolved = dataclasses.replace(self, **found)
        validation.check_kernels(resolved, default_platform)
        return resolved


@dataclass(frozen=True)
class DataConfig:
    """Corpus -> tokens on disk -> batches."""

    # python-stdlib | files by path or glob, comma separated | hub:OWNER/NAME[:CONFIG[:SPLIT]][@COMMIT] |
    # token ids as .npy | uuid-pairs:N (random keys and values, to be memorised)
    source: str = "python-stdlib"
    text_field: str = "text"  # of jsonl, parquet and hub rows
    completion_field: str | None = None  # behind it, and all that is learned: each row is a sequence of its own
    tokenizer: str = "train"  # train: SentencePiece on the corpus; or a tokenizer.model, tokenizer.json or directory
    sequence_length: int = 256
    validation_source: str | None = None  # text of its own to validate on; None: a part of the source, this share of it
    validation_fraction: float = 0.01
    document_mask: bool = False  # attention stays within a document
    max_documents: int | None = None
    cache: str = "runs/tokens"
    workers: int = 2  # processes that tokenize


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; data = -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class BalanceConfig:
    """Keeping the experts in use (GShard 2006.16668, ST-MoE 2202.08906, loss-free 2408.15664)."""

    loss: Literal["none", "pooled", "per_call"] = "pooled"  # over all layer calls at once | a call, then averaged
    weight: float = 0.01
    z_loss_weight: float = 0.0
    bias_rate: float = 0.0  # step of the loss-free selection bias; needs model.moe.selection_bias
    bias_scope: Literal["pooled", "per_call"] = "pooled"  # which counts the loss-free bias evens out
    # Routing has collapsed, and training stops, when a logged step uses the experts less evenly than this.
    entropy_floor: float = 0.0  # of the experts' use: 0 where every token chooses the same, 1 where it is even
    dead_share_limit: float = 1.0  # of experts that get under a tenth of the mean


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: AdamW, linear warm-up, cosine decay, and how often things are written."""

    steps: int = REQUIRED_INT
    batch_size: int = REQUIRED_INT  # sequences a step, over all devices
    accumulation: int = 1  # micro-batches a step
    learning_rate: float = 3e-4
    final_learning_rate: float = 3e-5
    warmup_steps: int = 0
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


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class AdapterConfig:
    """A change of low rank of some linear maps, trained while the base stays as it is (adapters/)."""

    method: Literal["lora", "rslora", "dora", "skema"] = "lora"
    # comma separated: q, k, v, o, gate, up, down, or attention (q,k,v,o) and mlp (gate,up,down); a map may name its
    # layers: k@10+11. Of a mixture, gate, up and down are those of every expert.
    targets: str = "q,v"
    layers: str = "all"  # of the targets that name none: all | top:L | every:s | numbers such as 3+5
    rank: int | None = None  # r of lora, rslora and dora
    sketch_width: int | None = None  # k of skema
    alpha: float | None = None  # None: what makes the scale 1
    projection: Literal["orthonormal", "gaussian", "srht"] = "orthonormal"  # of skema
    core: Literal["full", "low_rank"] = "full"  # of skema: M, or M = A·B through core_rank
    core_rank: int | None = None
    core_std: float = 0.0  # of M at the start; a low-rank core starts from 1e-3 where this is 0
    trainable_sketch: bool = False  # projections train as well
    stored_projections: bool = False  # written with the adapter, and not made again from the seed
    seed: int = 0


@dataclass(frozen=True)
class PoolStage:
    """A stage of `reduce`: all experts into one pool (reduction/pool.py)."""

    kind: Literal["pool"] = "pool"
    canonical: bool = True  # norm scales and output sizes folded first, so that layers can share experts
    start: Literal["lossless", "concat", "random"] = "lossless"
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    router: Literal["shared", "layer"] = "shared"
    bias: float | None = None  # against experts of other layers, in logits; None: exact
    offset: float = 0.0  # subtracted before sigmoid scores


@dataclass(frozen=True)
class PruneStage:
    """A stage of `reduce`: experts are scored on the training text, and the best are kept."""

    kind: Literal["prune"] = "prune"
    keep: float = 1.0  # share of the first model's experts, or their number; layers keep equally many, rounded up
    criterion: str = "reap"
    protect_super_experts: bool = False
    calibration_batches: int = 16  # of train.batch_size sequences
    seed: int = 0  # added to train.seed: which batches, and the random criterion


@dataclass(frozen=True)
class TuneStage:
    """A stage of `reduce`: some components train. Steps and rates; the rest is as `train` says."""

    kind: Literal["tune"] = "tune"
    # language_model: next token (and the teacher's distribution) | router: each layer's own experts chosen as before
    objective: Literal["language_model", "router"] = "language_model"
    components: str = "router"  # comma separated names of planning.COMPONENTS
    adapter: AdapterConfig | None = None  # trains as well, and is merged into the model at the end
    teacher_weight: float = 0.0  # share of KL(first model ‖ this one) in the loss
    bias_from: float | None = None  # c against experts of other layers at the first step, and
    bias_to: float = 0.0  # after anneal_share of the steps
    anneal_share: float = 0.8
    steps: int = REQUIRED_INT
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 0

    def schedule(self, train: TrainConfig) -> TrainConfig:
        """`train` with the steps and rates of this stage."""
        names = ("steps", "learning_rate", "final_learning_rate", "warmup_steps")
        return dataclasses.replace(train, **{name: getattr(self, name) for name in names})


Stage = PoolStage | PruneStage | TuneStage
STAGES = {"pool": PoolStage, "prune": PruneStage, "tune": TuneStage}


@dataclass(frozen=True)
class ReduceConfig:
    """One reduction: a model directory and what is done to it, stage by stage."""

    model: str = ""  # directory of a mixture of experts, of ours or of Hugging Face
    architecture: ModelConfig | None = None  # what `model` must be, if given: `plan` then works without the weights
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the parameters; what trains is kept in fp32
    order: str = ""  # the stages to run, comma separated: a ConfigDict sorts its keys
    stages: dict[str, Stage] = field(default_factory=dict)  # once parsed: those of `order`, in order
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)  # data.tokenizer=train: the model's own
    mesh: MeshConfig = field(default_factory=MeshConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class AdaptConfig:
    """One adaptation: a model directory, what changes it, and what it learns."""

    model: str = ""  # directory of the base, of ours or of Hugging Face
    base_sha256: str | None = None  # what it must be, as a manifest names its inputs; noted when a run starts
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)  # None: every parameter of the base trains
    budget: float | None = None  # share of the base's parameters that the adapter may train; gives rank or sketch_width
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"  # of the base; what trains is kept in fp32
    test_source: str | None = None  # text that the finished model is measured on, once
    recall_pairs: int = 100  # of each split, whose completions are asked for at every evaluation (completions only)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    data: DataConfig = field(default_factory=DataConfig)  # data.tokenizer=train: the base's own
    mesh: MeshConfig = field(default_factory=MeshConfig)
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(loss="none"))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(weight_decay=0.0, beta2=0.999))


@dataclass(frozen=True)
class GenerateConfig:
    """How prompts are continued (inference/generate.py)."""

    max_tokens: int = 128  # new ones, of each prompt
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int | None = None  # only the k most probable tokens
    top_p: float = 1.0  # only the most probable tokens that have this share together (arXiv:1904.09751)
    seed: int = 0
    end_ids: tuple[int, ...] = ()  # tokens that end a text
    cache_dtype: Literal["auto", "int8"] = "auto"  # auto: execution.compute_dtype


def base() -> ml_collections.ConfigDict:
    """Every key with its default, and `variants`: name -> the keys that differ, for runs compared side by side."""
    config = config_dict.of(RunConfig())
    config.variants = ml_collections.ConfigDict()
    return config


def reduce_base() -> ml_collections.ConfigDict:
    """As `base`, for `reduce`; a variant's `stages` replace the others."""
    config = config_dict.of(ReduceConfig())
    config.variants = ml_collections.ConfigDict()
    return config


def adapt_base() -> ml_collections.ConfigDict:
    """As `base`, for `adapt`."""
    config = config_dict.of(AdaptConfig())
    config.variants = ml_collections.ConfigDict()
    return config


def stage(kind: str, **changes: Any) -> dict[str, Any]:
    """The keys of a stage with their defaults, some of them changed."""
    return to_dict(STAGES[kind](**changes))


def in_order(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of a ReduceConfig, or of a variant, that say what is done in which order."""
    return {"order": ",".join(stages), "stages": stages}


def moe_base() -> ml_collections.ConfigDict:
    """The keys of `model.moe` with their defaults (None in `base()`: a dense model)."""
    return config_dict.of(MoEConfig())


def parse(config: ml_collections.ConfigDict, reader: Callable[[dict[str, Any]], T]) -> dict[str, T]:
    """The runs that a configuration describes: {"": run} or, with variants, one for each name.

    reader: what makes one run of nested plain values, such as run_from_dict.
    """
    raw = config.to_dict()
    variants = raw.pop("variants", {})
    if not variants:
        return {"": reader(raw)}
    if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
        raise UserError(f"config key variants must map names to groups of keys, got {variants!r}")
    for name in variants:
        if not name.isidentifier():  # which --config.variants.NAME.key=value could not name
            raise UserError(f"variant {name!r} must be a word of letters, digits and _ that starts with no digit")
    return {name: reader(config_dict.merge(raw, changes, f"variants.{name}")) for name, changes in variants.items()}


def run_from_dict(raw: dict[str, Any]) -> RunConfig:
    """A validated RunConfig from nested plain values, as in a run's config.json."""
    run = config_dict.build(RunConfig, raw, "")
    validation.check_run(run)
    return run


def reduce_from_dict(raw: dict[str, Any]) -> ReduceConfig:
    """A validated ReduceConfig from nested plain values."""
    run = config_dict.build(ReduceConfig, raw, "")
    names = run.order.split(",") if run.order else []
    if len(set(names)) < len(names) or not set(names) <= set(run.stages):
        known = ", ".join(run.stages) or "there is none"
        raise UserError(f"order={run.order!r} must name stages, each once; known: {known}")
    run = dataclasses.replace(run, stages={name: run.stages[name] for name in names})
    validation.check_reduce(run)
    return run


def adapt_from_dict(raw: dict[str, Any]) -> AdaptConfig:
    """A validated AdaptConfig from nested plain values."""
    run = config_dict.build(AdaptConfig, raw, "")
    validation.check_adapt(run)
    return run


def any_from_dict(raw: dict[str, Any]) -> RunConfig | ReduceConfig | AdaptConfig:
    """Any kind of run, by its keys."""
    if "adapter" in raw:
        return adapt_from_dict(raw)
    return reduce_from_dict(raw) if "stages" in raw else run_from_dict(raw)


def model_from_dict(raw: dict[str, Any], path: str = "model") -> ModelConfig:
    """A validated ModelConfig from nested plain values; errors name keys as below `path`."""
    model = config_dict.build(ModelConfig, raw, path)
    validation.check_model(model)
    return model


def to_dict(value: Any) -> dict[str, Any]:
    """Plain nested values for JSON; `run_from_dict` reads them back."""
    return dataclasses.asdict(value)
