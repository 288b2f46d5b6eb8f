"""Architecture of a model: sizes and layer types, from which parameter shapes follow."""

from dataclasses import dataclass, field
from typing import Literal

from moe_reduce.core.attention_config import LINEAR, LatentAttention, LinearAttention, RotaryScaling
from moe_reduce.core.checks import at_most, positive
from moe_reduce.core.errors import UserError

# Largest sizes that are accepted, far above any model's, so that nothing is made of a damaged config.json.
# Token ids are int32, and every layer and every expert has tensors of its own.
LARGEST = {
    "vocab_size": 2**31 - 1, "layers": 2**14, "width": 2**24, "query_heads": 2**20, "key_value_heads": 2**20,
    "head_width": 2**20, "feed_forward_width": 2**28, "embedding_factor": 2**24, "max_positions": 2**40,
}  # fmt: skip
LARGEST_MOE = {"experts": 2**20, "width": 2**28}
LARGEST_EXPERTS = 2**20  # in all layers together
WINDOWED, FULL = "w", "f"  # letters of ModelConfig.window_pattern
REQUIRED_INT = 0  # default of sizes that have no sensible default; `check` refuses it by name


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward block.

    Letters are those of moe_reduce.models: E experts of width F, of which A are active for each token. `width` here is
    F, the width of an expert; `ModelConfig.width` is D, the width of the residual stream.

    A router scores the experts, s = softmax(z) or sigmoid(z) of its logits z; chooses A by their scores, or by their
    scores and a bias, in the best groups; and weights their outputs by s, renormalised over the chosen if `normalize`
    says so, times `weight_scale`. Softmax scores renormalised are the softmax over the chosen logits.
    """

    experts: int = REQUIRED_INT  # E
    active: int = REQUIRED_INT  # A
    width: int = REQUIRED_INT  # F
    placement: Literal["layer", "shared"] = "layer"  # each layer owns E experts | one pool of E serves every layer
    router: Literal["layer", "shared"] = "layer"  # a shared router needs a shared pool
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # renormalise the weights over the chosen experts (norm_topk_prob)
    selection_bias: bool = False  # [N, E], affects only the choice of experts (loss-free balancing, pooling)
    score_offset: bool = False  # [N], subtracted from a layer's router logits before scoring (pooling with sigmoid)
    output_gain: bool = False  # [N, D], scales what the experts of each layer add to the residual stream
    init_scale: float = 1.0  # initial expert weights relative to those of a dense block
    # What the selection bias is added to: logits or scores, for the choice alone | logits, so that scores change too
    bias_on: Literal["logits_of_choice", "scores_of_choice", "logits"] = "logits_of_choice"
    groups: int = 1  # equal groups of neighbouring experts, of which a token's experts are in the best active_groups
    active_groups: int = 1
    group_score: Literal["maximum", "best_two"] = "maximum"  # of a group: its best score | the sum of its best two
    weight_scale: float = 1.0  # of all combine weights
    biases: bool = False  # on the router and on each matrix of the experts
    shared_width: int | None = None  # U, the width of a block beside the experts that computes every token
    shared_gate: bool = False  # scale that block's output by sigmoid(w·x)

    def check(self) -> None:
        """Raise UserError when the sizes contradict each other."""
        positive("model.moe", self, "experts", "active", "width", "init_scale")
        at_most("model.moe", self, LARGEST_MOE)
        if self.active > self.experts:
            raise UserError(f"model.moe.active ({self.active}) must not exceed model.moe.experts ({self.experts})")
        if self.router == "shared" and self.placement == "layer":
            raise UserError(
                "model.moe.router=shared needs model.moe.placement=shared: a router names experts of one pool"
            )
        positive("model.moe", self, "groups", "active_groups", "weight_scale")
        self._check_groups()
        if self.shared_width is not None:
            positive("model.moe", self, "shared_width")
        elif self.shared_gate:
            raise UserError("model.moe.shared_gate scales the shared block: give model.moe.shared_width")

    def _check_groups(self) -> None:
        size = self.experts // self.groups
        if self.experts % self.groups or self.active_groups > self.groups or self.active_groups * size < self.active:
            raise UserError(
                f"model.moe.experts ({self.experts}) must divide into model.moe.groups ({self.groups}) equal groups, "
                f"of which model.moe.active_groups ({self.active_groups}) hold the {self.active} active experts"
            )
        if self.groups > 1 and self.group_score == "best_two" and size < 2:
            raise UserError(f"model.moe.group_score=best_two needs groups of two experts or more, not of {size}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and layer types of a decoder. Letters are those of moe_reduce.models."""

    vocab_size: int = REQUIRED_INT  # V
    layers: int = REQUIRED_INT  # N
    width: int = REQUIRED_INT  # D, the width of the residual stream
    query_heads: int = REQUIRED_INT  # H
    key_value_heads: int = REQUIRED_INT  # G
    head_width: int = REQUIRED_INT  # C
    feed_forward_width: int | None = None  # F of dense models, U of dense layers before experts; else None
    moe: MoEConfig | None = None
    embedding_factor: int | None = None  # K of E = U·W (ALBERT, arXiv:1909.11942); None: one full matrix
    tied_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm_scope: Literal["head", "projection"] = "head"  # normalise each head | all heads of a token together
    clip_qkv: float | None = None  # clip queries, keys and values to ±clip_qkv, after their norm
    # layer: LayerNorm with a bias; centred_rms: RMSNorm whose scale is stored as its difference from 1
    norm: Literal["rms", "layer", "centred_rms"] = "rms"
    biases: bool = False  # on every linear map of attention and feed-forward
    attention_biases: Literal["none", "inputs", "all"] = "none"  # inputs: on queries, keys and values
    parallel_residual: bool = False  # attention and feed-forward read the same x, and both outputs are added to it
    # gelu: two matrices and the exact erf; clamped_swiglu: models/activations.py
    feed_forward: Literal["swiglu", "gelu", "clamped_swiglu"] = "swiglu"
    swiglu_limit: float = 7.0  # clamped_swiglu only, and so is the next
    swiglu_alpha: float = 1.702
    rotary_share: float = 1.0  # share of a head's width, from its start, that is rotated by position
    rotary_interleaved: bool = False  # rotated pairs are neighbours in a head, not half of the width apart
    rotary_scaling: RotaryScaling | None = None
    rope_theta: float = 10_000.0
    sliding_window: int | None = None  # most recent positions that a query sees, its own included; None: all
    # A letter for each layer, "w" where the window applies and "f" where a query sees all positions; None: all "w"
    window_pattern: str | None = None
    sinks: bool = False  # a learned logit for each head that takes part in the softmax, and has no value
    output_gate: bool = False  # scale each channel of a head's output by sigmoid(g), g made beside the head's query
    latent: LatentAttention | None = None
    linear: LinearAttention | None = None  # in some layers, in place of softmax attention
    dense_layers: int = 0  # first layers of a mixture of experts that have a feed-forward block in place of experts
    norm_epsilon: float = 1e-6
    max_positions: int = 2048  # context length before rotary scaling; `context` is the one that the model can read
    init_std: float = 0.02
    # Family whose config.json and tensor names describe the model on disk (families/); None: families/ chooses one. Two
    # configs that differ only in their family are the same architecture, and compare equal.
    family: str | None = field(default=None, compare=False)

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts; these are the last ones."""
        return 0 if self.moe is None else self.layers - self.dense_layers

    @property
    def context(self) -> int:
        """Number of positions that the model can read."""
        return self.max_positions if self.rotary_scaling is None else self.rotary_scaling.positions(self.max_positions)

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, counted from 0; None where a query sees all positions."""
        return self.sliding_window if self.window_pattern is None or self.window_pattern[layer] == WINDOWED else None

    def is_linear(self, layer: int) -> bool:
        """True if a layer, counted from 0, has linear attention."""
        return self.linear is not None and self.linear.pattern[layer] == LINEAR

    def check(self) -> None:
        """Raise UserError when the sizes contradict each other."""
        positive(
            "model", self, "vocab_size", "layers", "width", "query_heads", "key_value_heads", "head_width",
            "rope_theta", "norm_epsilon", "max_positions", "init_std",
        )  # fmt: skip
        at_most("model", self, LARGEST)
        if self.query_heads % self.key_value_heads:
            raise UserError(
                f"model.query_heads ({self.query_heads}) must be a multiple of model.key_value_heads "
                f"({self.key_value_heads})"
            )
        self._check_rotary()
        if self.clip_qkv is not None:
            positive("model", self, "clip_qkv")
        if self.embedding_factor is not None:
            positive("model", self, "embedding_factor")
            if not self.tied_embeddings:
                raise UserError("model.embedding_factor needs model.tied_embeddings=True: the factors serve both ends")
        self._check_blocks()
        self._check_windows()
        if self.linear is not None:
            self.linear.check(self.layers)
            self._check_linear()

    def _check_blocks(self) -> None:
        """Raise UserError unless each layer has one feed-forward block, or experts."""
        if self.dense_layers and not (self.moe is not None and 0 < self.dense_layers < self.layers):
            raise UserError(
                f"model.dense_layers ({self.dense_layers}) come before layers with experts: give model.moe, and more "
                f"layers than these ({self.layers} in all)"
            )
        if (self.moe is None or self.dense_layers > 0) != (self.feed_forward_width is not None):
            if self.dense_layers:
                raise UserError("model.dense_layers need model.feed_forward_width, their width")
            raise UserError("give exactly one of model.feed_forward_width (dense) and model.moe (experts)")
        if self.feed_forward_width is not None:
            positive("model", self, "feed_forward_width")
        if self.moe is not None:
            self._check_dense_only()
            self.moe.check()
            if self.moe.placement == "layer" and self.layers * self.moe.experts > LARGEST_EXPERTS:
                raise UserError(
                    f"model.layers ({self.layers}) times model.moe.experts ({self.moe.experts}) must be at most "
                    f"{LARGEST_EXPERTS}: correct one of them"
                )

    def _check_windows(self) -> None:
        if self.sliding_window is not None:
            positive("model", self, "sliding_window")
        pattern = self.window_pattern
        if pattern is None:
            return
        if self.sliding_window is None or len(pattern) != self.layers or set(pattern) != {WINDOWED, FULL}:
            raise UserError(
                f"model.window_pattern={pattern!r} must have a letter for each of {self.layers} layers, some "
                f"{WINDOWED!r} and some {FULL!r}, and needs model.sliding_window: leave it out if all layers are alike"
            )

    def _check_rotary(self) -> None:
        if self.rotary_scaling is not None:
            self.rotary_scaling.check()
        if self.latent is not None:
            self.latent.check(self.head_width)
            self._check_latent()
            return
        if self.head_width % 2:
            raise UserError(f"model.head_width must be even for rotary embeddings, got {self.head_width}")
        if not 0 < self.rotary_share <= 1:
            raise UserError(f"model.rotary_share must be above 0 and at most 1, got {self.rotary_share}")
        rotated = int(self.rotary_share * self.head_width)
        if rotated == 0 or rotated % 2:
            raise UserError(
                f"model.rotary_share={self.rotary_share} turns {rotated} of the {self.head_width} numbers of a head: "
                f"choose a share that makes this even and above 0 (model.head_width is {self.head_width})"
            )

    def _check_latent(self) -> None:
        """Raise UserError for an option that latent attention does not have."""
        if self.key_value_heads != self.query_heads:
            raise UserError(
                f"model.latent makes a key and a value for each query head: set model.key_value_heads to "
                f"{self.query_heads}, not {self.key_value_heads}"
            )
        for name, only in (
            ("qk_norm", False), ("clip_qkv", None), ("biases", False), ("attention_biases", "none"), ("sinks", False),
            ("rotary_share", 1.0), ("sliding_window", None), ("output_gate", False),
        ):  # fmt: skip
            if getattr(self, name) != only:
                raise UserError(f"model.{name}={getattr(self, name)} is not for latent attention: set it to {only}")

    def _check_linear(self) -> None:
        """Raise UserError for an option that a model with linear attention does not have."""
        for name, only in (("latent", None), ("sliding_window", None), ("dense_layers", 0), ("biases", False)):
            if getattr(self, name) != only:
                raise UserError(
                    f"model.{name}={getattr(self, name)} is not for models with linear attention: set it to {only}"
                )

    def _check_dense_only(self) -> None:
        """Raise UserError for an option that the decoder supports only without experts."""
        if self.feed_forward == "gelu":
            raise UserError("model.feed_forward=gelu is for dense models: with model.moe set it to swiglu")
        for name, value, only in (("biases", True, False), ("norm", "layer", "rms")):
            if getattr(self, name) == value:
                raise UserError(f"model.{name}={value} is for dense models: with model.moe set it to {only}")
