"""Score a model that does not fit into memory: read one layer, and a few of its experts, at a time.

Each layer runs on the whole calibration set before the next is read, so that each weight is read once.
"""

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
from moe_reduce.families import Leaf, leaves
from moe_reduce.models.decoder import STACK, AttentionHalf, LayerRouter
from moe_reduce.models.moe.dispatch import Assigned
from moe_reduce.models.moe.experts import Experts, cast_experts
from moe_reduce.models.moe.mixture import some_experts
from moe_reduce.models.parameters import by_path
from moe_reduce.models.weights import Weight
from moe_reduce.reduction.files import Directory
from moe_reduce.reduction.scores import Sums, combining, fetched, sums_of
from moe_reduce.storage.parameter_tensors import widest
from moe_reduce.training.task import Batch

CHUNK_BYTES = 40 * 1024**2  # size of the experts that are in memory at a time
ATTENTION_HALF = ("attention", "norm", "bias")  # components of a layer other than router and experts


def collect(directory: Directory, batches: Sequence[Batch], execution: ExecutionConfig) -> Sums:
    """Collect the same sums as scores.collect, with the attention and a few experts of one layer in memory at a time.

    For each token, three hidden states of D values of 4 bytes stay in memory too. Raises UserError for a shared pool,
    whose experts every layer needs, for a factorised embedding, for quantised weights, and without a batch.
    """
    config = directory.config
    if directory.moe.placement == "shared":
        raise UserError(f"{directory.path} has one pool for all layers: score it without --layer-wise")
    if config.embedding_factor is not None:
        raise UserError(f"{directory.path} has a factorised embedding: score it without --layer-wise")
    if directory.quantised:
        raise UserError(f"{directory.path} holds quantised weights: score it without --layer-wise")
    if not batches:
        raise UserError("no tokens to score with: give a larger --data")
    dtype = jnp.dtype(execution.compute_dtype)
    states = [_embed(directory, batch["tokens"], dtype) for batch in batches]
    weights = [jnp.asarray(batch["weights"]) for batch in batches]
    layers = []
    for layer in tqdm(range(config.layers), unit="layer", disable=not sys.stderr.isatty()):
        states, sums = _layer(directory, layer, states, weights, execution)
        layers.append(sums)
    tokens = sum(int(np.sum(np.asarray(batch["weights"]) > 0)) for batch in batches)
    stacked = {name: np.stack([sums[name] for sums in layers]) for name in layers[0]}
    return Sums(tokens, **stacked)


def _embed(directory: Directory, tokens_BT: Any, dtype: jnp.dtype) -> jax.Array:
    """Embed tokens; reads only the table rows of tokens that occur."""
    rows = directory.view(directory.layout("embedding"))[np.asarray(tokens_BT)]
    return jnp.asarray(rows).astype(dtype)


def _layer(directory: Directory, layer: int, states: list, weights: list, execution: ExecutionConfig):
    """Run one layer on all batches; return their new states and the summed statistics of its experts, [E] each."""
    config, moe = directory.config, directory.moe
    half = trees.unflatten(dict(_attention_half(directory, layer)))[STACK]
    router: dict[str, Any] = {"router": {"weight": _read(directory, directory.layout("router"), layer)}}
    for name, present in (("router_bias", moe.selection_bias), ("score_offset", moe.score_offset)):
        if present:
            router[name] = _read(directory, directory.layout(name), layer)
    gain_D = _read(directory, directory.layout("output_gain"), layer) if moe.output_gain else jnp.ones(config.width)
    attended = [attend(config, execution, half, router, x_BTD) for x_BTD in states]
    outputs: list[Any] = [None] * len(states)
    for first, experts in _chunks(directory, layer, execution.products):
        for batch, (_, normed_BTD, chosen_BTA, weights_BTA) in enumerate(attended):
            rows = Assigned(normed_BTD, chosen_BTA, weights_BTA)
            chunk_outputs = _experts(execution, moe.experts, rows, experts, jnp.int32(first))
            outputs[batch] = chunk_outputs if outputs[batch] is None else _add(outputs[batch], chunk_outputs)
    new_states, totals = [], None
    for (x_BTD, _, *routed), (y_BTD, sizes), weights_BT in zip(attended, outputs, weights, strict=True):
        new_states.append(x_BTD + (y_BTD * gain_D[None, None]).astype(x_BTD.dtype))
        assignments = dict(zip(("expert", "weight"), routed, strict=True)) | sizes._asdict()
        sums = fetched(_sums(assignments, weights_BT, moe.experts))
        totals = sums if totals is None else {name: combining(name)(totals[name], sums[name]) for name in sums}
    return new_states, totals


_sums = jax.jit(sums_of, static_argnums=2)


@partial(jax.jit, static_argnums=(0, 1))
def attend(config: ModelConfig, execution: ExecutionConfig, half, router, x_BTD):
    """Return the residual stream after attention, the experts' input, and the chosen experts with their weights."""
    batch, time, _ = x_BTD.shape
    positions_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (batch, time))
    applied: Any = AttentionHalf(config, execution).apply({"params": half}, x_BTD, positions_BT)
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


def _read(directory: Directory, leaf: Leaf, layer: int) -> jax.Array:
    return jnp.asarray(leaf.from_stored(directory.files.read_whole(leaf.name((layer,)))))


def _attention_half(directory: Directory, layer: int) -> Iterator[tuple[str, jax.Array]]:
    records = by_path(directory.config)
    for leaf in leaves(directory.config):
        if records[leaf.path].stacked and records[leaf.path].component in ATTENTION_HALF:
            yield leaf.path, _read(directory, leaf, layer)


def _chunks(directory: Directory, layer: int, layout: str) -> Iterator[tuple[int, Experts]]:
    """Read a layer's experts in chunks of equal size: (number of the first expert, matrices of the chunk)."""
    layouts = [directory.layout("experts", name) for name in ("gate", "up", "down")]
    names = [[leaf.name((layer, expert)) for leaf in layouts] for expert in range(directory.moe.experts)]
    expert_bytes = sum(directory.files.entries[name].stop - directory.files.entries[name].start for name in names[0])
    count = max(1, min(directory.moe.experts, CHUNK_BYTES // expert_bytes))
    while directory.moe.experts % count:
        count -= 1
    for first in range(0, directory.moe.experts, count):
        matrices = []
        for place, leaf in enumerate(layouts):
            tensors = (directory.files.read_whole(names[first + number][place]) for number in range(count))
            stacked = [leaf.from_stored(tensor) for tensor in tensors]
            dtype = widest({tensor.dtype for tensor in stacked})
            matrices.append(jnp.asarray(np.stack([tensor.astype(dtype, copy=False) for tensor in stacked])))
        yield first, Experts(*(Weight(matrix, layout=layout) for matrix in matrices))
