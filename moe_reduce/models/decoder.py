"""The decoder of every model: embedding, N blocks, norm, output logits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.model_config import WINDOWED
from moe_reduce.models import mixed_layers, products
from moe_reduce.models.attention.attention import Attention, Windowed
from moe_reduce.models.attention.latent import LatentAttention
from moe_reduce.models.attention.linear import LinearAttention
from moe_reduce.models.cache import CACHE, KEYS_VALUES
from moe_reduce.models.collect import sow
from moe_reduce.models.deltas import ADAPTER, BANK, every_layer
from moe_reduce.models.embedding import Embedding, Unembedding
from moe_reduce.models.feed_forward import FeedForward
from moe_reduce.models.mesh import replicated, shard_batch
from moe_reduce.models.moe.experts import ExpertPool, Experts, Masters, Router, read_gain
from moe_reduce.models.moe.mixture import choose_experts, mixture_of_experts
from moe_reduce.models.moe.routing import RouterWeights
from moe_reduce.models.norms import residual_norm
from moe_reduce.models.records import (
    ATTENTION,
    FIRST_STACK,
    LINEAR_ATTENTION,
    STACK,
    Stack,
    layers_with,
    parameters,
    stack_of,
    stacks,
)
from moe_reduce.models.weights import read

REMAT_POLICIES = {
    # by name, because JAX's dots policies do not see products inside custom_vjp functions
    "dots": jax.checkpoint_policies.save_only_these_names(products.REMAT_SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}
COLLECT = ("routing", "assignments", "hidden", KEYS_VALUES)  # what a block sows when asked (see Model.apply)


class Shared(NamedTuple):
    """The shared expert pool and shared router that every block reads; None where layers have their own."""

    experts: Experts | None = None
    router: RouterWeights | None = None


class Block(nn.Module):
    """Pre-norm attention, then feed-forward or experts; each output is added to the residual stream.

    With config.parallel_residual both halves read the block's input (GPT-J; arXiv:2204.06745). A block uses the experts
    and router of `shared`, or its own where these are None. The master weights of shared experts (moe/experts.py) pass
    from block to block with x, so that the backward pass accumulates their gradient.
    """

    config: ModelConfig
    execution: ExecutionConfig
    dense: bool | None = None  # True for a layer without experts; None: as config.moe says
    linear: bool = False  # True for a layer with linear attention

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Masters],
        positions_BT,
        segments_BT,
        shared: Shared,
        real_BT=None,
        windowed: Windowed = None,
    ) -> tuple[tuple[jax.Array, Masters], None]:
        x_BTD, masters = carry
        sow(self, "hidden", {"block_input": x_BTD})
        x_BTD, normed_BTD = attention_half(self, x_BTD, positions_BT, segments_BT, windowed, real_BT)
        if self.config.moe is None if self.dense is None else self.dense:
            y_BTD = FeedForward(self.config, self.execution, name="mlp")(normed_BTD)
        else:
            y_BTD, masters = expert_half(self, normed_BTD, masters, shared, real_BT)
        sow(self, "hidden", {"block_output": x_BTD + y_BTD})
        return (shard_batch(x_BTD + y_BTD), masters), None


def attention_half(
    block: Any, x_BTD, positions_BT, segments_BT, windowed: Windowed = None, real_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Run the attention half in the module scope of `block`: (x after attention, normed input of the second half)."""
    config, execution = block.config, block.execution
    normed_BTD = residual_norm(config, "attention_norm")(x_BTD)
    if block.linear:
        mixed_BTD = LinearAttention(config, execution, name=LINEAR_ATTENTION)(normed_BTD, segments_BT, real_BT)
    else:
        kind = Attention if config.latent is None else LatentAttention
        mixed_BTD = kind(config, execution, name=ATTENTION)(normed_BTD, positions_BT, segments_BT, windowed)
    attended_BTD = x_BTD + mixed_BTD
    read_BTD = x_BTD if config.parallel_residual else attended_BTD
    return attended_BTD, residual_norm(config, "mlp_norm")(read_BTD)


def expert_half(
    block: Any, normed_BTD: jax.Array, masters: Masters, shared: Shared, real_BT: jax.Array | None
) -> tuple[jax.Array, Masters]:
    """Run the expert half in the module scope of `block`: (its output, master weights for the next block)."""
    config, execution = block.config, block.execution
    if shared.experts is None:
        experts, used_masters = ExpertPool(config, execution, name="experts")()
    else:
        experts, used_masters = shared.experts, masters
    router = router_weights(block, shared.router)
    routing = choose_experts(normed_BTD, router, config.moe, real_BT)
    y_BTD, used_masters, statistics, assignments = mixture_of_experts(
        normed_BTD, routing, experts, used_masters, execution, real_BT
    )
    gain_D = read_gain(block)
    if gain_D is not None:
        y_BTD = y_BTD * jnp.broadcast_to(gain_D.astype(y_BTD.dtype), y_BTD.shape)
    sow(block, "hidden", {"router_input": normed_BTD})
    sow(block, "routing", statistics)
    sow(block, "assignments", assignments)
    if config.moe.shared_width is not None:
        y_BTD = y_BTD + shared_block(block, normed_BTD)
    return y_BTD, masters if shared.experts is None else used_masters


def shared_block(block: Any, normed_BTD: jax.Array) -> jax.Array:
    """Output of the block beside the experts, in the module scope of `block`."""
    y_BTD = FeedForward(block.config, block.execution, name="shared_expert")(normed_BTD)
    if not block.config.moe.shared_gate:
        return y_BTD
    gate_D = read(block, "shared_expert_gate").astype(jnp.float32)
    share_BT1 = jax.nn.sigmoid(jnp.sum(normed_BTD.astype(jnp.float32) * gate_D[None, None], axis=-1, keepdims=True))
    return (y_BTD.astype(jnp.float32) * share_BT1).astype(y_BTD.dtype)


def router_weights(block: Any, shared: RouterWeights | None) -> RouterWeights:
    """Router weights of a block: the shared router or its own, and its own selection bias and score offset."""
    moe = block.config.moe
    router = Router(block.config, block.execution, name="router")() if shared is None else shared
    bias_E = read(block, "router_bias") if moe.selection_bias else None
    return router._replace(bias_E=bias_E, offset=read(block, "score_offset") if moe.score_offset else None)


class AttentionHalf(nn.Module):
    """A block's attention half as its own module, with the same parameter names, to run a model layer by layer."""

    config: ModelConfig
    execution: ExecutionConfig
    windowed: bool | None = None
    linear: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None = None):
        return attention_half(self, x_BTD, positions_BT, segments_BT, self.windowed)


class DenseLayer(nn.Module):
    """A layer without experts as its own module, with the same parameter names, to run a model layer by layer."""

    config: ModelConfig
    execution: ExecutionConfig
    windowed: bool | None = None
    linear: bool = False

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD, normed_BTD = attention_half(self, x_BTD, positions_BT, None, self.windowed)
        return x_BTD + FeedForward(self.config, self.execution, name="mlp")(normed_BTD)


class SharedBlock(nn.Module):
    """The block beside a layer's experts as its own module, with the same parameter names."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, normed_BTD: jax.Array) -> jax.Array:
        return shared_block(self, normed_BTD)


class LayerRouter(nn.Module):
    """A layer's router as its own module, with the same parameter names, to run a model layer by layer."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, normed_BTD: jax.Array):
        assert self.config.moe is not None
        return choose_experts(normed_BTD, router_weights(self, None), self.config.moe)


class Decoder(nn.Module):
    """tokens_BT int32 -> logits_BTV fp32.

    `segments` (document index within the row) keeps attention inside a document; `positions` restart at 0 in each
    document. `real_BT` is True for tokens counted in router statistics. `last` [B] selects one position of each row:
    logits are then [B, 1, V]. `noise` [B, T, D] is added to the embedded tokens. With a cache among the variables, the
    tokens continue it at `positions`.

    stacked: True runs a scan over layers with stacked parameters; False a Python loop over parameters from `unstacked`.
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
        noise: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        embedding = Embedding(config, self.execution, name="embedding")
        x_BTD = shard_batch(embedding.encode(tokens_BT))
        if noise is not None:
            x_BTD = x_BTD + noise.astype(x_BTD.dtype)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :], tokens_BT.shape)
        shared, masters = self._shared()
        carry, arguments = (x_BTD, masters), (positions, segments, shared, real_BT)
        if self.stacked:
            for stack in stacks(config):
                if config.linear is not None:
                    carry = self._mixed(stack, carry, *arguments)
                    continue
                carry, _ = self._layers(stack)(carry, *arguments, _windowed(config, stack))
        else:
            carry = self._one_by_one(carry, *arguments)
        x_BTD, _ = carry
        if last is not None:
            x_BTD = x_BTD[jnp.arange(x_BTD.shape[0]), last][:, None]
        x_BTD = residual_norm(config, "final_norm")(x_BTD)
        if config.tied_embeddings:
            return embedding.decode(x_BTD)
        return Unembedding(config, self.execution, name="unembedding")(x_BTD)

    def _shared(self) -> tuple[Shared, Masters]:
        moe = self.config.moe
        experts, masters, router = None, (), None
        if moe is not None and moe.placement == "shared":
            experts, masters = ExpertPool(self.config, self.execution, name="experts")()
        if moe is not None and moe.router == "shared":
            # gathered once, not in every layer
            router = jax.tree.map(replicated, Router(self.config, self.execution, name="router")())
        return Shared(experts, router), masters

    def _layers(self, stack: Stack) -> nn.Module:
        block: Any = Block
        if self.execution.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.execution.remat], prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, ADAPTER: 0, CACHE: 0, **dict.fromkeys(COLLECT, 0)},
            split_rngs={"params": True},
            in_axes=(*(nn.broadcast,) * 4, 0),  # type: ignore[arg-type]
            length=stack.layers,
            unroll=min(self.execution.scan_unroll, stack.layers),
        )
        return scanned(self.config, self.execution, stack.dense, name=stack.key)

    def _mixed(self, stack: Stack, carry, *arguments):
        """Run layers of several kinds, which nn.scan cannot stack; each layer is applied as a block of its own."""
        config, execution = self.config, self.execution
        collect = [name for name in COLLECT if self.is_mutable_collection(name)]
        held = {name: self.variables.get(name, {}) for name in ("params", ADAPTER, CACHE)}
        held = {name: tree[stack.key] for name, tree in held.items() if stack.key in tree}

        def run(layer: int, variables: dict[str, Any], carry: Any) -> tuple[Any, Any]:
            block: Any = Block(config, execution, stack.dense, config.is_linear(layer), parent=None)

            def apply(variables: dict[str, Any], carry: Any, *arguments: Any) -> Any:
                (carry, _), sown = block.apply(variables, carry, *arguments, mutable=collect)
                return carry, sown

            if execution.remat != "none":
                apply = jax.checkpoint(apply, policy=REMAT_POLICIES[execution.remat], prevent_cse=False)
            return apply(variables, carry, *arguments)

        carry, sown = mixed_layers.scan(config, stack, held, carry, run, execution.scan_unroll)
        for name, values in sown.items():
            self.put_variable(name, stack.key, values)
        return carry

    def _one_by_one(self, carry, *arguments):
        for number in range(self.config.layers):
            dense, linear = stack_of(self.config, number).dense, self.config.is_linear(number)
            block: Any = Block(self.config, self.execution, dense, linear, name=_name(number))
            carry, _ = block(carry, *arguments, layer_windowed(self.config, number))
        return carry


def layer_windowed(config: ModelConfig, layer: int) -> bool | None:
    """True if a layer has a sliding window; None if all layers are alike."""
    return None if config.window_pattern is None else config.window_pattern[layer] == WINDOWED


def _windowed(config: ModelConfig, stack: Stack) -> jax.Array | None:
    """`layer_windowed` of each layer of a stack: layers with and without a window have equal parameters."""
    if config.window_pattern is None:
        return None
    return jnp.array([config.window_pattern[stack.first + layer] == WINDOWED for layer in range(stack.layers)])


def joined(sown: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Values that the layers of all stacks sowed, by name, stacked over the layers that sow them."""
    found: dict[str, list[jax.Array]] = {}
    for stack in (FIRST_STACK, STACK):
        for name, values in sown.get(stack, {}).items():
            found.setdefault(name, []).append(values)
    return {name: values[0] if len(values) == 1 else jnp.concatenate(values) for name, values in found.items()}


def unstacked(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Parameters and adapters with each layer's arrays copied out of the stack, for a Python loop over layers.

    A CPU copies a stacked matrix at each use, which takes most of the time of decoding one token.
    """
    found = _unstacked({name: tree for name, tree in params.items() if name not in (ADAPTER, BANK)}, config)
    return found | {name: _unstacked(every_layer(params), config) for name in (ADAPTER, BANK) if name in params}


def _unstacked(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A tree without stacks."""
    found = {name: branch for name, branch in tree.items() if name not in (FIRST_STACK, STACK)}
    for stack in stacks(config):
        for part, branch in tree.get(stack.key, {}).items():
            leaves, structure = jax.tree.flatten(branch)
            layers = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
            for number, layer in zip(layers_with(config, stack, part), layers, strict=True):
                found.setdefault(_name(number), {})[part] = structure.unflatten(layer)
    return found


def _stacked(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Parameters of a Python loop over layers, with those of all layers stacked."""
    layers = [_name(number) for number in range(config.layers)]
    found = trees.flatten({name: branch for name, branch in tree.items() if name not in layers})
    for record in parameters(config):
        if record.stacked:
            part = record.path.removeprefix(f"{record.stack}/")
            found[record.path] = jnp.stack([trees.flatten(tree[_name(number)])[part] for number in record.layers])
    return trees.unflatten(found)


def _name(number: int) -> str:
    return f"{STACK}_{number}"


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh fp32 parameters; linen folds each path into the key."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    execution = ExecutionConfig(dispatch="reference")  # parameters do not depend on the dispatch
    if config.linear is not None:
        return _stacked(Decoder(config, execution, stacked=False).init(key, tokens)["params"], config)
    return dict(Decoder(config, execution).init(key, tokens)["params"])
