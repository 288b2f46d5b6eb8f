"""Quantisation-aware training: a task whose matrices are rounded where products read them.

The masters train in fp32. Gradients of the rounded values pass to them unchanged, by the straight-through estimator
(Bengio, Léonard and Courville, arXiv:1308.3432). Ternary matrices take their scale, the mean magnitude, from the
present masters (BitNet b1.58, arXiv:2402.17764).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import Parameter, by_path, parameters
from moe_reduce.models.rounded import Rounded
from moe_reduce.training.task import Params, Task

KEPT = ("router",)  # components that a scheme without a name leaves as they are
KEEP = "keep"
LARGEST = {"int8": 127, "int4": 7}
USUAL_GROUP = {"int4": 128}
TINY = 1e-8  # smallest scale, by which values are divided
Schemes = dict[str, "Rounding"]  # by component


@dataclass(frozen=True)
class Rounding:
    """Rounding of matrices to int8, int4 or ternary values; group: inputs that share a scale, 0 for all."""

    code: str
    group: int = 0

    def __call__(self, values: jax.Array, record: Parameter) -> jax.Array:
        """Round the values of one layer. record: without the axis of layers."""
        matrices, back = as_matrices(values, record)
        return back(self._ternary(matrices) if self.code == "ternary" else self._integers(matrices))

    def _integers(self, matrices: jax.Array) -> jax.Array:
        """Nearest of the integers from -largest to largest times a scale, for each output and group of inputs."""
        largest, (lead, inputs, outputs) = LARGEST[self.code], matrices.shape
        grouped = matrices.reshape(lead, -1, self.group or inputs, outputs)
        scale = jnp.max(jnp.abs(grouped), axis=2, keepdims=True) / largest
        return _nearest(grouped, scale, largest).reshape(matrices.shape)

    def _ternary(self, matrices: jax.Array) -> jax.Array:
        """Nearest of -1, 0 and 1 times the mean magnitude of each matrix."""
        return _nearest(matrices, jnp.mean(jnp.abs(matrices), axis=(1, 2), keepdims=True), 1)


def _nearest(values: jax.Array, scale: jax.Array, largest: int) -> jax.Array:
    spread = jnp.broadcast_to(scale, values.shape)
    return jnp.clip(jnp.round(values / jnp.maximum(spread, TINY)), -largest, largest) * spread


def as_matrices(values: jax.Array, record: Parameter):
    """(values as [matrices, I, O], function that turns such an array back). record: of these values."""
    lead = [axis for axis, letter in enumerate(record.axes) if letter not in record.inputs + record.outputs]
    order = (*lead, *record.contracted, *(record.axes.index(letter) for letter in record.outputs))
    moved = jnp.transpose(values, order)
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def back(matrices: jax.Array) -> jax.Array:
        return jnp.transpose(matrices.reshape(moved.shape), inverse)

    inputs, outputs = record.matrix_shape
    return moved.reshape(math.prod(values.shape[axis] for axis in lead), inputs, outputs), back


def parse(schemes: str, config: ModelConfig) -> Schemes:
    """Read the schemes of `qat.schemes` for a model, by component; {} for none.

    Raises UserError for an unknown scheme, a component without matrices, and groups that do not divide a matrix.
    """
    known = {record.component for record in parameters(config) if record.is_matrix}
    named: dict[str, str] = {}
    for part in filter(None, schemes.split(",")):
        component, equals, scheme = part.rpartition("=")
        if equals and component not in known:
            raise UserError(
                f"qat.schemes: the model has no matrices of {component!r}; it has {', '.join(sorted(known))}"
            )
        named |= {component: scheme} if equals else dict.fromkeys(known - set(KEPT) - set(named), scheme)
    found = {name: _scheme(scheme) for name, scheme in named.items() if scheme != KEEP}
    for record in parameters(config):
        group = found[record.component].group if record.is_matrix and record.component in found else 0
        if group and record.matrix_shape[0] % group:
            raise UserError(
                f"qat.schemes: groups of {group} do not divide the {record.matrix_shape[0]} inputs of {record.path}: "
                f"choose smaller groups, or {record.component}={KEEP}"
            )
    return found


def _scheme(name: str) -> Rounding:
    code, _, rest = name.partition("-")
    group = rest.removeprefix("g")
    if code == "ternary" and not rest:
        return Rounding(code)
    if code in LARGEST and (rest in ("", "channel") or (rest.startswith("g") and group.isdigit() and int(group))):
        return Rounding(code, int(group) if group.isdigit() else 0 if rest else USUAL_GROUP.get(code, 0))
    raise UserError(f"qat.schemes: {name!r} is unknown; known: int8, int4 (groups of 128), int4-g64, ternary, {KEEP}")


def quantisation_aware(task: Task, config: ModelConfig, schemes: Schemes) -> Task:
    """Return the task with the model's matrices rounded in its loss, its evaluation and its measurements."""
    if not schemes:
        return task
    wrap = partial(wrapped, config=config, schemes=schemes)
    return dataclasses.replace(
        task,
        loss=lambda params, batch: task.loss(wrap(params), batch),
        evaluate=lambda params, batch: task.evaluate(wrap(params), batch),
        measure=lambda params: task.measure(rounded(params, config, schemes)),
    )


def wrapped(params: Params, config: ModelConfig, schemes: Schemes) -> Params:
    """Parameters whose matrices of the named components are `Rounded`; all others as they are."""
    chosen = {record.path: schemes[record.component] for record in _chosen(config, schemes)}
    return trees.map_with_path(lambda path, leaf: Rounded(leaf, chosen[path]) if path in chosen else leaf, params)


def rounded(params: Params, config: ModelConfig, schemes: Schemes) -> Params:
    """Parameters with the values that products read, in the dtype of the masters."""
    if not schemes:
        return params
    records, chosen = by_path(config), {record.path for record in _chosen(config, schemes)}

    def value(path: str, leaf: jax.Array) -> jax.Array:
        return schemes[records[path].component](leaf, records[path]) if path in chosen else leaf

    return jax.jit(partial(trees.map_with_path, value))(params)


def _chosen(config: ModelConfig, schemes: Schemes) -> list[Parameter]:
    return [record for record in parameters(config) if record.is_matrix and record.component in schemes]
