"""Score a model that does not fit into memory: read one layer, and a few of its experts, at a time.

Each layer runs on the whole calibration set before the next is read, so that each weight is read once.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.families import ParameterLayout, parameter_layouts
from moe_reduce.models.activations import Gated
from moe_reduce.models.decoder import AttentionHalf, DenseLayer, LayerRouter, SharedBlock, layer_windowed
from moe_reduce.models.moe.dispatch import Assigned
from moe_reduce.models.moe.experts import MATRICES, Experts, cast_experts
from moe_reduce.models.moe.mixture import some_experts
from moe_reduce.models.records import Stack, stack_of
from moe_reduce.models.weights import Weight
from moe_reduce.reduction.files import Directory
from moe_reduce.reduction.scores import Sums, combining, fetched, sums_of
from moe_reduce.storage import quantised
from moe_reduce.storage.parameter_tensors import widest
from moe_reduce.training.task import Batch

CHUNK_BYTES = 40 * 1024**2  # size of the experts that are in memory at a time
# components of the attention half of a layer
ATTENTION_HALF = ("attention", "linear_attention", "norm", "bias", "sinks")
Kind = tuple[bool | None, bool]  # of a layer: whether it has a window (None: all are alike), and linear attention
DENSE_LAYER = (*ATTENTION_HALF, "feed_forward")


def collect(directory: Directory, batches: Sequence[Batch], execution: ExecutionConfig) -> Sums:
    """Collect the same sums as scores.collect, with the attention and a few experts of one layer in memory at a time.

    For each token, three hidden states of D values of 4 bytes stay in memory too. Quantised weights are dequantised as
    they are read. Raises UserError for a shared pool, whose experts every layer needs, for a factorised embedding, and
    without a batch.
    """
    config = directory.config
    if directory.moe.placement == "shared":
        raise UserError(f"{directory.path} has one pool for all layers: score it without --layer-wise")
    if config.embedding_factor is not None:
        raise UserError(f"{directory.path} has a factorised embedding: score it without --layer-wise")
    if not batches:
        raise UserError("no tokens to score with: give a larger --data")
    dtype = jnp.dtype(execution.compute_dtype)
    states = [_embed(directory, batch["tokens"], dtype) for batch in batches]
    weights = [jnp.asarray(batch["weights"]) for batch in batches]
    layers = []
    for layer in tqdm(range(config.layers), unit="layer", disable=not sys.stderr.isatty()):
        if layer < config.dense_layers:
            params = _layer_params(directory, layer, DENSE_LAYER)
            windowed = layer_windowed(config, layer)  # linear attention is only in layers with experts
            states = [_dense(config, execution, windowed, params, x_BTD) for x_BTD in states]
            continue
        states, sums = _layer(directory, layer, states, weights, execution)
        layers.append(sums)
    tokens = sum(int(np.sum(np.asarray(batch["weights"]) > 0)) for batch in batches)
    stacked = {name: np.stack([sums[name] for sums in layers]) for name in layers[0]}
    return Sums(tokens, **stacked)


def _embed(directory: Directory, tokens_BT: Any, dtype: jnp.dtype) -> jax.Array:
    """Embed tokens; reads only the table rows of tokens that occur."""
    tokens_BT, table = np.asarray(tokens_BT), directory.layout("embedding")
    if table.path not in directory.quantised:
        return jnp.asarray(directory.view(table)[tokens_BT]).astype(dtype)
    value = jax.tree.map(jnp.asarray, quantised.read_value(table, directory.files, ()))
    return value.rows(tokens_BT, dtype)


def _layer(directory: Directory, layer: int, states: list, weights: list, execution: ExecutionConfig):
    """Run one layer on all batches; return their new states and the summed statistics of its experts, [E] each."""
    config, moe, row = directory.config, directory.moe, layer - directory.config.dense_layers
    half = _layer_params(directory, layer, ATTENTION_HALF)
    router = _layer_params(directory, layer, ("router", "router_bias", "score_offset"))
    shared = _layer_params(directory, layer, ("shared_expert",))
    gain_D = _read(directory, directory.layout("output_gain"), row) if moe.output_gain else jnp.ones(config.width)
    kind = layer_windowed(config, layer), config.is_linear(layer)
    attended = [attend(config, execution, half, router, x_BTD, kind) for x_BTD in states]
    outputs: list[Any] = [None] * len(states)
    for first, experts in _chunks(directory, row, execution.products):
        for batch, (_, normed_BTD, chosen_BTA, weights_BTA) in enumerate(attended):
            rows = Assigned(normed_BTD, chosen_BTA, weights_BTA)
            chunk_outputs = _experts(execution, moe.experts, rows, experts, jnp.int32(first))
            outputs[batch] = chunk_outputs if outputs[batch] is None else _add(outputs[batch], chunk_outputs)
    new_states, totals = [], None
    for (x_BTD, normed_BTD, *routed), (y_BTD, sizes), weights_BT in zip(attended, outputs, weights, strict=True):
        y_BTD = (y_BTD * gain_D[None, None]).astype(x_BTD.dtype)
        if moe.shared_width is not None:
            y_BTD = y_BTD + _beside(config, execution, shared, normed_BTD)
        new_states.append(x_BTD + y_BTD)
        assignments = dict(zip(("expert", "weight"), routed, strict=True)) | sizes._asdict()
        sums = fetched(_sums(assignments, weights_BT, moe.experts))
        totals = sums if totals is None else {name: combining(name)(totals[name], sums[name]) for name in sums}
    return new_states, totals


_sums = jax.jit(sums_of, static_argnums=2)


@partial(jax.jit, static_argnums=(0, 1))
def _beside(config: ModelConfig, execution: ExecutionConfig, shared, normed_BTD) -> jax.Array:
    """Run the block beside a layer's experts."""
    y_BTD: Any = SharedBlock(config, execution).apply({"params": shared}, normed_BTD)
    return y_BTD


@partial(jax.jit, static_argnums=(0, 1, 2))
def _dense(config: ModelConfig, execution: ExecutionConfig, windowed: bool | None, params, x_BTD) -> jax.Array:
    """Run a layer without experts."""
    new_BTD: Any = DenseLayer(config, execution, windowed).apply({"params": params}, x_BTD, _positions(x_BTD))
    return new_BTD


def _positions(x_BTD: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None], x_BTD.shape[:2])


@partial(jax.jit, static_argnums=(0, 1, 5))
def attend(config: ModelConfig, execution: ExecutionConfig, half, router, x_BTD, kind: Kind = (None, False)):
    """Return the residual stream after attention, the experts' input, and the chosen experts with their weights."""
    batch, time, _ = x_BTD.shape
    module = AttentionHalf(config, execution, *kind)
    applied: Any = module.apply({"params": half}, x_BTD, _positions(x_BTD))
    x_BTD, normed_BTD = applied
    routing: Any = LayerRouter(config, execution).apply({"params": router}, normed_BTD)
    shape = (batch, time, -1)
    return x_BTD, normed_BTD, routing.experts_SA.reshape(shape), routing.weights_SA.reshape(shape)


@partial(jax.jit, static_argnums=(0, 1))
def _experts(execution: ExecutionConfig, layer_experts: int, rows: Assigned, experts: Experts, first):
    """Run a chunk of a layer's experts: their summed output, and the sizes of each assignment's."""
    fraction = experts.number / layer_experts
    experts, _ = cast_experts(experts, rows.x_SD.dtype, trained=False)
    result = some_experts(rows, experts, execution, first, fraction)
    return result.y_SD, result.sizes


@jax.jit
def _add(left, right):
    return jax.tree.map(jnp.add, left, right)  # an assignment's sizes are 0 in all chunks but its expert's


def _read(directory: Directory, leaf: ParameterLayout, row: int) -> jax.Array:
    """Values of one layer. row: its place in its stack."""
    return jnp.asarray(quantised.read_values(leaf, directory.files, (row,)))


def _layer_params(directory: Directory, layer: int, components: Sequence[str]) -> dict[str, Any]:
    """Parameters of these components in one layer, as its modules name them; {} if it has none."""
    stack: Stack = stack_of(directory.config, layer)
    found = {
        leaf.path: _read(directory, leaf, leaf.record.layers.index(layer))
        for leaf in parameter_layouts(directory.config)
        if leaf.record.stack == stack.key and leaf.record.component in components and layer in leaf.record.layers
    }
    return trees.unflatten(found).get(stack.key, {})


def _chunks(directory: Directory, row: int, layout: str) -> Iterator[tuple[int, Experts]]:
    """Read a layer's experts in chunks of equal size: (number of the first expert, weights of the chunk)."""
    moe, activation = directory.moe, Gated.of(directory.config)
    matrices = [directory.layout("experts", name) for name in MATRICES]
    biases = [directory.layout("experts", f"{name}_bias") for name in MATRICES if moe.biases]
    expert_bytes = sum(_itemsize(directory, leaf, row) * math.prod(leaf.shape[2:]) for leaf in matrices)
    count = max(1, min(moe.experts, CHUNK_BYTES // expert_bytes))
    while moe.experts % count:
        count -= 1
    for first in range(0, moe.experts, count):
        numbers = range(first, first + count)
        values = {leaf.record.name: jnp.asarray(_expert_values(directory, leaf, row, numbers)) for leaf in matrices}
        added = tuple(jnp.asarray(_expert_values(directory, leaf, row, numbers))[:, None] for leaf in biases)
        weights = {name: Weight(value, layout=layout) for name, value in values.items()}
        yield first, Experts(**weights, biases=added, activation=activation)


def _itemsize(directory: Directory, leaf: ParameterLayout, row: int) -> int:
    """Bytes of a value of an expert's matrix, as it is in memory."""
    if leaf.path in directory.quantised:
        return np.dtype(np.float32).itemsize
    return directory.files.entries[leaf.name((row, 0)[: len(leaf.stacked)])].dtype.itemsize


def _expert_values(directory: Directory, leaf: ParameterLayout, row: int, numbers: range) -> np.ndarray:
    """Values of some experts of a layer, whose tensors hold one expert each, or all of them."""
    files = directory.files
    if len(leaf.stacked) == 1:
        return np.array(quantised.read_values(leaf, files, (row,), slice(numbers.start, numbers.stop)))
    stacked = [quantised.read_values(leaf, files, (row, number)) for number in numbers]
    dtype = widest({np.dtype(values.dtype) for values in stacked})
    return np.stack([values.astype(dtype) for values in stacked])
