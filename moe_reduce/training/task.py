"""Tasks: descriptions of what the loop learns, so that it needs to know no adapter and no router."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from moe_reduce.core import trees
from moe_reduce.models.parameters import Records

TEACHER = "teacher"  # path below which a task finds the frozen leaves of a second model
Params = dict[str, Any]
Batch = dict[str, jax.Array]
Sums = dict[str, Any]


def no_change(params: Params, metrics: dict[str, jax.Array]) -> Params:
    """Return the parameters as they are: the `after_step` of a task that learns by gradients alone."""
    del metrics
    return params


def never(metrics: dict[str, float]) -> str | None:
    """Return None: the `stop` of a task that never ends early."""
    del metrics
    return None


def nothing_else(params: Params) -> dict[str, float]:
    """Return no figures: the `measure` of a task that needs batches only."""
    del params
    return {}


def every_leaf(path: str) -> bool:
    """Return True: the `trainable` of a task that trains every leaf."""
    del path
    return True


def split_teacher(params: Params) -> tuple[Params, Params]:
    """Split parameters into the student's and the teacher's."""
    student = dict(params)
    return student, student.pop(TEACHER, {})


@dataclass(frozen=True)
class Task:
    """A loss, the leaves that it trains, and their evaluation.

    - loss(params, batch) -> (scalar, metrics): the mean over the targets that `weights` count. Metrics are fp32:
      scalars are logged, arrays are for `after_step`.
    - evaluate(params, batch) -> fp32 sums that are added over the validation batches: a `Mean` (training/validation.py)
      for each scalar metric, at least `loss` (nats per token) and `accuracy`, and any arrays.
    - records: the record of every leaf, trained or frozen, by path; they decide shardings and weight decay.
    - trainable(path): whether a leaf trains. All others get no gradient and no optimiser state.
    - after_step(trained params, metrics) -> trained params: changes that no gradient makes, such as loss-free balancing
      and annealing.
    - stop(logged scalars) -> why training must end, or None.
    - measure(params) -> scalars: called at every evaluation, outside jit, for figures that batches do not give, such as
      those of generated text.
    """

    loss: Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Batch], Sums]
    records: Records
    trainable: Callable[[str], bool] = every_leaf
    after_step: Callable[[Params, dict[str, jax.Array]], Params] = no_change
    stop: Callable[[dict[str, float]], str | None] = never
    measure: Callable[[Params], dict[str, float]] = nothing_else


def partition(params: Params, trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Split a tree into (leaves that train, leaves that do not)."""
    flat = trees.flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if trainable(path)}
    frozen = {path: leaf for path, leaf in flat.items() if not trainable(path)}
    return trees.unflatten(trained), trees.unflatten(frozen)


def join(trained: Params, frozen: Params) -> Params:
    """Merge the two trees of `partition`."""
    return trees.unflatten(trees.flatten(trained) | trees.flatten(frozen))
