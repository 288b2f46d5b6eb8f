"""What the loop is given: it learns whatever a task describes, and never what an adapter or a router is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from moe_reduce.core import trees
from moe_reduce.models.parameters import Records

TEACHER = "teacher"  # the frozen leaves of a second model that a task compares with lie below this name
Params = dict[str, Any]
Batch = dict[str, jax.Array]
Sums = dict[str, Any]


def no_change(params: Params, metrics: dict[str, jax.Array]) -> Params:
    """The `after_step` of a task in which everything is learned by gradients."""
    del metrics
    return params


def never(metrics: dict[str, float]) -> str | None:
    """The `stop` of a task that has no reason to end early."""
    del metrics
    return None


def nothing_else(params: Params) -> dict[str, float]:
    """The `measure` of a task whose batches say all there is to say."""
    del params
    return {}


def every_leaf(path: str) -> bool:
    """The `trainable` of a task in which everything trains."""
    del path
    return True


@dataclass(frozen=True)
class Task:
    """A loss, which leaves train, and how to evaluate.

    loss(params, batch) -> (scalar, metrics): a mean over the batch's counted targets (`weights`). Metrics are fp32
    scalars, to be logged, or arrays, for `after_step`. evaluate(params, batch) -> fp32 sums over the counted targets,
    at least `nll`, `correct` and `weight`; arrays are summed over batches and handed back. trainable(path) says which
    leaves train; the others get no gradient and no optimiser state. after_step(trained params, metrics) -> trained
    params makes changes that no gradient makes, such as loss-free balancing, or annealing. stop(logged scalars) -> why
    training must end, or None. measure(params) -> scalars, called at every evaluation outside of jit, for what takes
    more than a batch, such as generating text. records: of every leaf, trained or frozen, by path; they decide
    shardings and weight decay.
    """

    loss: Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    evaluate: Callable[[Params, Batch], Sums]
    records: Records
    trainable: Callable[[str], bool] = every_leaf
    after_step: Callable[[Params, dict[str, jax.Array]], Params] = no_change
    stop: Callable[[dict[str, float]], str | None] = never
    measure: Callable[[Params], dict[str, float]] = nothing_else


def partition(params: Params, trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """(leaves that train, leaves that do not), two trees that `join` puts together again."""
    flat = trees.flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if trainable(path)}
    frozen = {path: leaf for path, leaf in flat.items() if not trainable(path)}
    return trees.unflatten(trained), trees.unflatten(frozen)


def join(trained: Params, frozen: Params) -> Params:
    """The inverse of `partition`."""
    return trees.unflatten(trees.flatten(trained) | trees.flatten(frozen))
