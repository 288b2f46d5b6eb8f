"""Questions about a model's parameters, answered from their records (models/records.py).

Initialisation, abstract parameters, sharding, weight decay, counts, casts, adapter targets, slices by expert or layer,
and the layout on disk all read these records and nothing else.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_reduce.core import trees
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER, BANK
from moe_reduce.models.records import (
    FIRST_STACK,
    ROUTER_BIAS,
    STACK,
    Parameter,
    parameters,
    residual_std,
    stack_of,
    stacks,
)

__all__ = [
    "FIRST_STACK", "ROUTER_BIAS", "STACK", "Parameter", "abstract_params", "bias_of", "by_path", "counts_by_component",
    "ffn_norm_scale", "find_in_module", "nested_under", "norm_before", "only_record", "parameter_count", "parameters",
    "record_at", "record_in_module", "records", "residual_std", "select", "stack_of", "stacks", "stored_params",
]  # fmt: skip

Records = Mapping[str, Parameter]
GAIN = "/magnitude"  # path suffix of DoRA's magnitudes, which are not decayed, unlike other adapter leaves


@functools.cache
def by_path(config: ModelConfig) -> Records:
    """The records of `parameters`, by path."""
    return {record.path: record for record in parameters(config)}


def record_in_module(config: ModelConfig, scope: tuple[str, ...], name: str) -> Parameter:
    """Record of parameter `name` of the linen module at `scope`; ValueError if the model has none."""
    record = find_in_module(config, scope, name)
    if record is None:
        raise ValueError(f"the model has no parameter {name} in the module {'/'.join(scope) or '(root)'}")
    return record


@functools.cache
def find_in_module(config: ModelConfig, scope: tuple[str, ...], name: str) -> Parameter | None:
    """Record of parameter `name` of the linen module at `scope`, or None.

    The scope of an unstacked layer begins with `layers_0`, `layers_1`, …. Layer-wise code applies a block's modules
    outside a Decoder, where their scope lacks the leading keys, so a path may also match by its end.
    """
    path, known = "/".join((*scope, name)), by_path(config)
    unstacked = re.match(r"layers_(\d+)/", path)
    if unstacked:
        path = f"{stack_of(config, int(unstacked[1])).key}/{path[unstacked.end() :]}"
    return known[path] if path in known else next((known[p] for p in known if p.endswith(f"/{path}")), None)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters as jax.ShapeDtypeStruct leaves of one dtype; nothing is allocated."""
    return trees.unflatten({p.path: jax.ShapeDtypeStruct(p.shape, dtype) for p in parameters(config)})


def stored_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Abstract parameters as a run holds them: `float32_stored` ones in fp32, the others in `dtype`."""
    return trees.unflatten(
        {
            p.path: jax.ShapeDtypeStruct(p.shape, jnp.float32 if p.precision == "float32_stored" else dtype)
            for p in parameters(config)
        }
    )


def records(config: ModelConfig, params: trees.Tree) -> dict[str, Parameter]:
    """Records of every leaf of `params`, adapter leaves included, by path. UserError for a path that has none."""
    found: dict[str, Parameter] = {}
    for path, leaf in trees.flatten(params).items():
        if path.startswith((f"{ADAPTER}/", f"{BANK}/")):
            found[path] = _adapter_leaf(config, path, tuple(leaf.shape))
        else:
            found[path] = record_at(by_path(config), path)
    return found


def record_at(known: Records, path: str) -> Parameter:
    """The record at a path; raises UserError where there is none."""
    if path not in known:
        raise UserError(f"parameter {path} has no record: add it to models/records.py")
    return known[path]


def nested_under(prefix: str, known: Records) -> dict[str, Parameter]:
    """The records of a tree nested under the key `prefix` of another tree, such as a teacher's."""
    return {f"{prefix}/{path}": record for path, record in known.items()}


def _adapter_leaf(config: ModelConfig, path: str, shape: tuple[int, ...]) -> Parameter:
    """Record of a leaf of an adapter or a bank, with axes [N if stacked, E if per expert, Z if of a bank, …]."""
    key, _, rest = path.partition("/")
    target = next((record for record in parameters(config) if rest.startswith(f"{record.path}/")), None)
    if target is None:
        raise UserError(f"adapter leaf {path} belongs to no parameter of this model: give the adapter of this model")
    several = {4: "EZIO", 3: "ZIO"} if key == BANK else {3: "EIO"}
    count = len(shape) - target.stacked
    axes = "N" * target.stacked + several.get(count, "IO"[:count])
    mesh_axes = tuple("expert" if letter == "E" else None for letter in axes)
    zeros, decays = nn.initializers.zeros, not path.endswith(GAIN)
    return Parameter(path, axes, shape, zeros, ADAPTER, decays, "float32", mesh_axes)


def counts_by_component(config: ModelConfig) -> dict[str, int]:
    """Number of parameters of each component, by name."""
    counts: dict[str, int] = {}
    for record in parameters(config):
        counts[record.component] = counts.get(record.component, 0) + math.prod(record.shape)
    return dict(sorted(counts.items()))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of a model."""
    return sum(counts_by_component(config).values())


def select(config: ModelConfig, *, component: str | None = None, matrix: bool | None = None) -> tuple[Parameter, ...]:
    """Records filtered by component and by matrix (True: matrices, False: all others). UserError if none is left."""
    found = tuple(
        record
        for record in parameters(config)
        if component in (None, record.component) and matrix in (None, record.is_matrix)
    )
    if not found:
        known = ", ".join(counts_by_component(config))
        raise UserError(f"the model has no parameters of component {component!r}; it has {known}")
    return found


def only_record(config: ModelConfig, component: str, name: str | None = None) -> Parameter:
    """The only record of a component, or of a name within it; ValueError if there is none, or more than one.

    Without a name, the only matrix of a component that has biases too.
    """
    found = [p for p in parameters(config) if p.component == component and name in (None, p.name)]
    if len(found) > 1:
        found = [p for p in found if p.is_matrix]
    (record,) = found
    return record


def bias_of(config: ModelConfig, matrix: Parameter) -> Parameter | None:
    """Record of the bias added to the output of a matrix; None without one."""
    return by_path(config).get(f"{matrix.path}_bias")


def ffn_norm_scale(config: ModelConfig) -> Parameter:
    """Record of the scale of the norm before the feed-forward block, or in an MoE before the router and experts."""
    return by_path(config)["layers/mlp_norm/scale"]


def norm_before(config: ModelConfig, half: Literal["attention", "mlp"]) -> tuple[Parameter, ...]:
    """Records of the norm before a half of each block: its scale and, in a LayerNorm, its bias."""
    known = by_path(config)
    paths = (f"layers/{half}_norm/{name}" for name in ("scale", "bias"))
    return tuple(known[path] for path in paths if path in known)
