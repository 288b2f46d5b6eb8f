"""Quantisation-aware training: a task whose matrices are rounded where products read them.

The masters train in fp32. Gradients of the rounded values pass to them unchanged, by the straight-through estimator
(Bengio, Léonard and Courville, arXiv:1308.3432). Scales follow the present masters: ternary ones are their mean
magnitude (BitNet b1.58, arXiv:2402.17764).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import Scheme
from moe_reduce.models.parameters import Parameter, by_path
from moe_reduce.models.rounded import Rounded
from moe_reduce.models.weights import quantise
from moe_reduce.quantization.choice import choose
from moe_reduce.quantization.round_to_nearest import KEPT, schemes_by_path
from moe_reduce.training.task import Params, Task


@dataclass(frozen=True)
class SchemeRounding:
    """Rounding of a matrix to the nearest values of a scheme."""

    scheme: Scheme

    def __call__(self, values: jax.Array, record: Parameter) -> jax.Array:
        """Round the values of one layer, or of all."""
        return quantise(values, record, self.scheme).dequantised(values.dtype)


def parse(text: str, config: ModelConfig, key: str = "qat.schemes") -> dict[str, Scheme]:
    """Read the schemes of training for a model: the scheme by path of each matrix that is rounded; {} for none.

    key: names the text in the configuration. Raises UserError for an unknown scheme, a component without matrices, and
    groups that do not divide a matrix.
    """
    if not text:
        return {}
    try:
        return schemes_by_path(config, choose(config, text, KEPT, key))
    except UserError as error:
        prefix = "" if str(error).startswith(key) else f"{key}: "
        raise UserError(f"{prefix}{error}") from None


def quantisation_aware(task: Task, config: ModelConfig, by_path: Mapping[str, Scheme]) -> Task:
    """Return the task with some matrices of the model rounded in its loss, its evaluation and its measurements."""
    if not by_path:
        return task
    wrap = partial(wrapped, by_path)
    return dataclasses.replace(
        task,
        loss=lambda params, batch: task.loss(wrap(params), batch),
        evaluate=lambda params, batch: task.evaluate(wrap(params), batch),
        measure=lambda params: task.measure(quantised(params, config, by_path)),
    )


def wrapped(by_path: Mapping[str, Scheme], params: Params) -> Params:
    """Parameters in which matrices with a scheme are `Rounded`."""
    return trees.map_with_path(
        lambda path, leaf: Rounded(leaf, SchemeRounding(by_path[path])) if path in by_path else leaf, params
    )


def quantised(params: Params, config: ModelConfig, schemes: Mapping[str, Scheme]) -> Params:
    """Parameters in which matrices with a scheme hold, as quantised values, what products read of the masters.

    Leaves may be abstract.
    """
    flat, records = trees.flatten(params), by_path(config)
    return trees.unflatten(
        flat | {path: _rounded(flat[path], records[path], scheme) for path, scheme in schemes.items()}
    )


def _rounded(leaf: Any, record: Parameter, scheme: Scheme) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(partial(quantise, record=record, scheme=scheme), leaf)
    return _quantise(leaf, record, scheme)


_quantise = jax.jit(quantise, static_argnums=(1, 2))
