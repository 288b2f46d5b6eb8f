"""One decoder for all models: embedding, N scanned blocks, norm, output logits."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import ones, zeros

from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.models import products
from moe_reduce.models.cache import CACHE, KEYS_VALUES
from moe_reduce.models.deltas import ADAPTER, variables
from moe_reduce.models.layers import Attention, Embedding, FeedForward, Unembedding, residual_norm
from moe_reduce.models.mesh import shard_batch, whole
from moe_reduce.models.moe.dispatch import Experts, Pool
from moe_reduce.models.moe.experts import ExpertPool, Router, mixture_of_experts

REMAT_POLICIES = {
    # by name: a policy that looks for products does not see into those with gradients of our own
    "dots": jax.checkpoint_policies.save_only_these_names(products.KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
STACK = "layers"  # key of the stacked layers among the parameters
COLLECT = ("routing", "assignments", "hidden", KEYS_VALUES)  # what a block sows when asked (see Model.apply)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, or experts, each added to the residual stream, one after the other.

    With config.parallel_residual both read the stream as the block found it (GPT-J; arXiv:2204.06745).

    Uses the shared pool and router that it is given, and makes its own where it is given none. The masters of a shared
    pool go from block to block with x, so that their gradient is added up on the way back.

    Sows, for those who ask (see `COLLECT`).
    """

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Experts | None], positions_BT, segments_BT, shared, router_DE, real_BT=None
    ):
        config, execution = self.config, self.execution
        x_BTD, masters = carry
        computed, changes = shared
        _sow(self, "hidden", {"block_input": x_BTD})
        x_BTD, normed_BTD = _attend(config, execution, x_BTD, positions_BT, segments_BT)
        if config.moe is None:
            y_BTD = FeedForward(config, execution, name="mlp")(normed_BTD)
        else:
            if masters is None:
                pool = _pool(ExpertPool(config, name="experts"), x_BTD.dtype, execution)
            else:
                pool = Pool(computed, masters, changes)
            router_DE = Router(config, name="router")() if router_DE is None else router_DE
            bias_E = self.param("router_bias", zeros, (config.moe.experts,)) if config.moe.selection_bias else None
            offset = self.param("score_offset", zeros, ()) if config.moe.score_offset else None
            y_BTD, pool, statistics, assignments = mixture_of_experts(
                normed_BTD, pool, router_DE, bias_E, offset, config.moe, execution, real_BT
            )
            masters = None if masters is None else pool.masters
            if config.moe.output_gain:
                gain_D = self.param("output_gain", ones, (config.width,)).astype(y_BTD.dtype)
                y_BTD = y_BTD * jnp.broadcast_to(gain_D, y_BTD.shape)
            _sow(self, "hidden", {"router_input": normed_BTD})
            _sow(self, "routing", statistics)
            _sow(self, "assignments", assignments)
        _sow(self, "hidden", {"block_output": x_BTD + y_BTD})
        return (shard_batch(x_BTD + y_BTD), masters), None


def _pool(experts: ExpertPool, dtype: jnp.dtype, execution: ExecutionConfig) -> Pool:
    masters, changes = experts()
    return Pool.of(masters if execution.expert_gradients else jax.lax.stop_gradient(masters), dtype, changes)


def _attend(config: ModelConfig, execution: ExecutionConfig, x_BTD, positions_BT, segments_BT):
    """The first half of a block, as submodules of whoever calls: (x after attention, what the second half reads)."""
    normed_BTD = residual_norm(config, "attention_norm")(x_BTD)
    attended_BTD = x_BTD + Attention(config, execution, name="attention")(normed_BTD, positions_BT, segments_BT)
    read_BTD = x_BTD if config.parallel_residual else attended_BTD
    return attended_BTD, residual_norm(config, "mlp_norm")(read_BTD)


class AttentionHalf(nn.Module):
    """The first half of a block by itself, under the same parameter names: for models that pass layer by layer."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None = None):
        return _attend(self.config, self.execution, x_BTD, positions_BT, segments_BT)


def _sow(module: nn.Module, collection: str, values: dict[str, jax.Array]) -> None:
    """Hand out values for those who collect them; without the tuple that linen collects repeated calls in."""
    for name, value in values.items():
        last: Any = {"reduce_fn": lambda _, new: new, "init_fn": dict}
        module.sow(collection, name, value, **last)


class Decoder(nn.Module):
    """tokens_BT int32 -> logits_BTV fp32.

    `segments_BT` (document index within the row) keeps attention inside a document, `positions_BT` restarts there.
    `real_BT` says which tokens count in the statistics of routing.
    `last_B` names the only place of each row whose logits are wanted: they are [B, 1, V] then. With a cache among the
    variables the tokens go on where it ends, at `positions_BT` (see models/cache.py).

    stacked: one scan over layers, whose parameters are stacked; else one by one, from parameters that `unstacked` made.
    """

    config: ModelConfig
    execution: ExecutionConfig
    stacked: bool = True

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        last: jax.Array | None = None,
        real_BT: jax.Array | None = None,
    ) -> jax.Array:
        config, segments_BT, positions_BT, last_B = self.config, segments, positions, last
        embedding = Embedding(config, self.execution, name="embedding")
        x_BTD = shard_batch(embedding.encode(tokens_BT))
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
        (computed, masters, changes), router_DE = self._shared(x_BTD.dtype)
        layers = self._layers() if self.stacked else self._one_by_one
        (x_BTD, _), _ = layers((x_BTD, masters), positions_BT, segments_BT, (computed, changes), router_DE, real_BT)
        if last_B is not None:
            x_BTD = x_BTD[jnp.arange(x_BTD.shape[0]), last_B][:, None]
        x_BTD = residual_norm(config, "final_norm")(x_BTD)
        if config.tied_embeddings:
            return embedding.decode(x_BTD)
        return Unembedding(config, self.execution, name="unembedding")(x_BTD)

    def _shared(self, dtype: jnp.dtype) -> tuple[Pool | tuple[None, None, None], jax.Array | None]:
        moe = self.config.moe
        shared = moe is not None and moe.placement == "shared"
        pool = _pool(ExpertPool(self.config, name="experts"), dtype, self.execution) if shared else (None, None, None)
        # gathered once, and not by every layer's call
        router_DE = whole(Router(self.config, name="router")()) if moe and moe.router == "shared" else None
        return pool, router_DE

    def _layers(self) -> nn.Module:
        block: Any = Block
        if self.execution.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.execution.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, ADAPTER: 0, CACHE: 0, **dict.fromkeys(COLLECT, 0)},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=self.config.layers,
            unroll=min(self.execution.scan_unroll, self.config.layers),
        )
        return scanned(self.config, self.execution, name="layers")

    def _one_by_one(self, carry, *arguments):
        for number in range(self.config.layers):
            carry, _ = Block(self.config, self.execution, name=_name(number))(carry, *arguments)
        return carry, None


def unstacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, and their adapter, for layers computed one by one: copies, each layer's by itself.

    Reading them saves a CPU a copy of every matrix at each use, which is most of the time of a single token.
    """
    found = {name: tree for name, tree in params.items() if name not in (STACK, ADAPTER)}
    if ADAPTER in params:
        found[ADAPTER] = unstacked(variables(params)[ADAPTER])
    if STACK not in params:
        return found
    leaves, structure = jax.tree.flatten(params[STACK])
    layers = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
    return found | {_name(number): structure.unflatten(layer) for number, layer in enumerate(layers)}


def _name(number: int) -> str:
    return f"layers_{number}"


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh fp32 parameters. The order of initialisation does not matter: linen folds each path into the key."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    execution = ExecutionConfig(dispatch="reference")  # shapes and values do not depend on how it is computed
    return dict(Decoder(config, execution).init(key, tokens)["params"])
