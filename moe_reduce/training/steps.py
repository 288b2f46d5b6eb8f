"""The compiled functions of a run: initial state, one training step, one evaluation step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moe_reduce.core import trees
from moe_reduce.core.config import TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import Records
from moe_reduce.training import optimizer, sharding
from moe_reduce.training.task import Batch, Params, Sums, Task, join


class State(NamedTuple):
    """Everything that training changes, and so what a checkpoint holds."""

    step: jax.Array  # int32, number of steps done
    params: Params  # the leaves that train, fp32
    optimizer: optax.OptState
    average: Params | None  # exponential moving average of params


@dataclass(frozen=True)
class Program:
    """The functions that a run compiles, and the shardings of their state.

    Enough to compile a run for devices that this machine does not have.
    """

    new_state: Callable[[Params], State]
    state: State  # abstract leaves with their shardings
    shardings: State
    step: Any  # (state, frozen, batch) -> (state, metrics), jitted; donates the state's buffers
    evaluate: Any  # (params, frozen, batch) -> sums, jitted


def program(task: Task, train: TrainConfig, mesh: Mesh, params: Params) -> Program:
    """Build the program of a run. params: the leaves that train, real or abstract."""
    tx = optimizer.build(train, params, task.records)
    make = partial(new_state, train=train, tx=tx)
    shapes = jax.eval_shape(make, params)
    shardings = state_shardings(mesh, shapes, task.records)
    everywhere = sharding.replicated(mesh)
    step = jax.jit(partial(train_step, task, train, tx), donate_argnums=0, out_shardings=(shardings, everywhere))
    evaluate = jax.jit(partial(evaluate_step, task), out_shardings=everywhere)
    return Program(make, sharding.placed(shapes, shardings), shardings, step, evaluate)


def new_state(params: Params, train: TrainConfig, tx: optax.GradientTransformation) -> State:
    """State at step 0. Call it under jit with output shardings, so that no leaf is made whole on one device."""
    average = jax.tree.map(jnp.copy, params) if train.ema_decay else None
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def state_shardings(mesh: Mesh, abstract: State, records: Records) -> State:
    """Shardings of a run's state: every optimiser leaf that belongs to a parameter is sharded like it.

    The suffix of an optimiser leaf's path names its parameter, whatever optax wraps around it. Replicated are scalars,
    and constants of the optimiser outside every tree of parameters, such as the coefficients of Muon. Raises UserError
    for a leaf inside such a tree that matches no parameter, rather than replicating it silently.
    """
    params = sharding.shardings(mesh, abstract.params, records)
    shapes, by_path = trees.flatten(abstract.params), trees.flatten(params)

    def shard(keys: tuple[Any, ...], leaf: Any) -> Any:
        if not leaf.shape or not _per_parameter(keys, by_path):
            return sharding.replicated(mesh)
        path = _parameter_path(keys, by_path)
        if path is None or shapes[path].shape != leaf.shape:
            raise UserError(
                f"optimiser state {jax.tree_util.keystr(keys)} of shape {list(leaf.shape)} belongs to no parameter: "
                "it cannot be sharded"
            )
        return by_path[path]

    moments = jax.tree_util.tree_map_with_path(shard, abstract.optimizer)
    step: Any = sharding.replicated(mesh)
    return State(step, params, moments, params if abstract.average is not None else None)


def _per_parameter(keys: tuple[Any, ...], known: Mapping[str, Any]) -> bool:
    """Tell whether a leaf lies in a tree of parameters: in a dict of their names, or below the name of a parameter."""
    roots = {path.split("/")[0] for path in known}
    *outer, last = _names(keys)
    return not roots.isdisjoint(last) or any(_longest_suffix(names, known) for names in outer)


def _parameter_path(keys: tuple[Any, ...], known: Mapping[str, Any]) -> str | None:
    """Longest suffix of a key path that names a parameter; None if none does."""
    return _longest_suffix(_names(keys)[-1], known)


def _names(keys: tuple[Any, ...]) -> list[list[str]]:
    """Divide a key path into the names of consecutive dicts; other keys, such as fields of optax states, end a list."""
    found: list[list[str]] = [[]]
    for key in keys:
        if isinstance(key, jax.tree_util.DictKey):
            found[-1].append(str(key.key))
        else:
            found.append([])
    return found


def _longest_suffix(names: list[str], known: Mapping[str, Any]) -> str | None:
    paths = ("/".join(names[start:]) for start in range(len(names)))
    return next((path for path in paths if path in known), None)


def train_step(task: Task, train: TrainConfig, tx: optax.GradientTransformation, state: State, frozen, batch: Batch):
    """Take one optimiser step over a batch in `train.accumulation` micro-batches; return (state, metrics).

    The task's loss also gets `draws`, uint32 [B]: numbers that no other row of this or another step has, for randomness
    that a resumed run repeats.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    draws_B = state.step.astype(jnp.uint32) * jnp.uint32(rows) + jnp.arange(rows, dtype=jnp.uint32)
    batch = {**batch, "draws": draws_B}
    (_, metrics), gradients = _gradients(task, train.accumulation, state.params, frozen, batch)
    updates, optimizer_state = tx.update(gradients, state.optimizer, state.params)
    params: Any = task.after_step(optax.apply_updates(state.params, updates), metrics)  # type: ignore[arg-type]
    average = state.average
    if average is not None:
        average = jax.tree.map(lambda mean, new: mean + (1.0 - train.ema_decay) * (new - mean), average, params)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics["parameter_norm"] = optax.tree.norm(params)
    metrics["learning_rate"] = jnp.asarray(optimizer.learning_rate(train)(state.step), jnp.float32)
    return State(state.step + 1, params, optimizer_state, average), metrics


def _gradients(task: Task, parts: int, params: Params, frozen: Params, batch: Batch):
    def loss(params: Params, part: Batch, share: jax.Array):
        value, metrics = task.loss(join(params, frozen), part)
        return value * share, jax.tree.map(lambda metric: metric * share, metrics)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return value_and_grad(params, batch, jnp.ones(()))
    # part i holds rows i, i + parts, …, so that every device has rows in every part
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        share = jnp.sum(part["weights"]) / total
        return jax.tree.map(jnp.add, carry, value_and_grad(params, part, share)), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(value_and_grad, params, first, jnp.ones(()))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, split)[0]


def evaluate_step(task: Task, params: Params, frozen: Params, batch: Batch) -> Sums:
    """Evaluate one batch; return its sums."""
    return task.evaluate(join(params, frozen), batch)


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
    """Raise UserError when the batch does not divide over devices and micro-batches."""
    rows = sharding.batch_shards(mesh)
    if train.batch_size % (rows * train.accumulation):
        raise UserError(
            f"train.batch_size ({train.batch_size}) must be a multiple of mesh.data · mesh.fsdp · mesh.expert · "
            f"train.accumulation ({rows} · {train.accumulation})"
        )
