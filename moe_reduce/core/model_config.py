"""Architecture of a model: sizes and layer types, from which parameter shapes follow."""

from dataclasses import dataclass, field
from typing import Literal

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
REQUIRED_INT = 0  # default of sizes that have no sensible default; `check` refuses it by name


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward block.

    Letters are those of moe_reduce.models: E experts of width F, of which A are active for each token. `width` here is
    F, the width of an expert; `ModelConfig.width` is D, the width of the residual stream.
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


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and layer types of a decoder. Letters are those of moe_reduce.models."""

    vocab_size: int = REQUIRED_INT  # V
    layers: int = REQUIRED_INT  # N
    width: int = REQUIRED_INT  # D, the width of the residual stream
    query_heads: int = REQUIRED_INT  # H
    key_value_heads: int = REQUIRED_INT  # G
    head_width: int = REQUIRED_INT  # C
    feed_forward_width: int | None = None  # F of dense models; None when `moe` is given
    moe: MoEConfig | None = None
    embedding_factor: int | None = None  # K of E = U·W (ALBERT, arXiv:1909.11942); None: one full matrix
    tied_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm_scope: Literal["head", "projection"] = "head"  # normalise each head | all heads of a token together
    clip_qkv: float | None = None  # clip queries, keys and values to ±clip_qkv, after their norm
    norm: Literal["rms", "layer"] = "rms"  # layer: LayerNorm with a bias
    biases: bool = False  # on every linear map of attention and feed-forward
    parallel_residual: bool = False  # attention and feed-forward read the same x, and both outputs are added to it
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"  # gelu: two matrices and the exact erf
    rotary_share: float = 1.0  # share of a head's width, from its start, that is rotated by position
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    max_positions: int = 2048  # intended context length; only written to config.json
    init_std: float = 0.02
    # Family whose config.json and tensor names describe the model on disk (families/); None: families/ chooses one. Two
    # configs that differ only in their family are the same architecture, and compare equal.
    family: str | None = field(default=None, compare=False)

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
        if (self.moe is None) == (self.feed_forward_width is None):
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

    def _check_rotary(self) -> None:
        if self.head_width % 2:
            raise UserError(f"model.head_width must be even for rotary embeddings, got {self.head_width}")
        if not 0 < self.rotary_share <= 1:
            raise UserError(f"model.rotary_share must be above 0 and at most 1, got {self.rotary_share}")
        rotated = int(self.rotary_share * self.head_width)
        if rotated == 0 or rotated % 2:
            raise UserError(
                f"model.rotary_share={self.rotary_share} turns {rotated} of the {self.head_width} numbers of a head: "
                "choose a share that makes this even and above 0"
            )

    def _check_dense_only(self) -> None:
        """Raise UserError for an option that the decoder supports only without experts."""
        for name, only in (("feed_forward", "swiglu"), ("biases", False), ("norm", "rms")):
            value = getattr(self, name)
            if value != only:
                raise UserError(f"model.{name}={value} is for dense models: with model.moe set it to {only}")
