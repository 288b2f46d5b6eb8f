"""Leaves of an adapter for one target: shapes, dtypes and initial values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import projections
from moe_reduce.adapters.targets import Target
from moe_reduce.core.config import AdapterConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models import weights

LOW_RANK_CORE_STD = 1e-3  # of both factors of M, unless core_std is given
Shape = tuple[int, ...]
# (layer, shape of one layer's values, the base's parameter) -> one layer's values
Start = Callable[[int, Shape, Any], Any]


@dataclass(frozen=True)
class AdapterLeaf:
    """One leaf of an adapter: the shape of one layer's values, their dtype, and the function that initialises them."""

    shape: Shape
    dtype: Any
    start: Start

    def init(self, target: Target, weight: Any) -> Any:
        """Initial values, stacked over the target's layers; jax.ShapeDtypeStruct if `weight` is abstract.

        weight: the target's parameter in the base.
        """
        stack = () if target.layers is None else (len(target.layers),)
        if is_abstract(weight):
            return jax.ShapeDtypeStruct((*stack, *self.shape), self.dtype)
        values = [self.start(layer, self.shape, weight) for layer in target.layers or (0,)]
        return jnp.asarray(jnp.stack(values) if stack else values[0], self.dtype)


def leaves_of(config: AdapterConfig, target: Target) -> dict[str, AdapterLeaf]:
    """Leaves of a target, by their path relative to the target."""
    found = _sketch(config, target) if config.method == "skema" else _low_rank(config, target)
    found["scale"] = AdapterLeaf((), jnp.float32, _constant(scale(config)))
    if config.method == "dora":
        found["magnitude"] = AdapterLeaf((target.out_features,), jnp.float32, partial(_row_norms, target))
        found["present"] = AdapterLeaf((), jnp.float32, _constant(1.0))
    if target.layers is not None:
        found["layer_numbers"] = AdapterLeaf((), jnp.int32, lambda layer, shape, _: jnp.full(shape, layer, jnp.int32))
    return found


def is_abstract(value: Any) -> bool:
    """True for a leaf, or a quantised weight, that has shapes but no values."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))


def trained_names(config: AdapterConfig) -> frozenset[str]:
    """Names of the leaves that train, as in `leaves_of`."""
    factors = {"in/matrix", "out/matrix"}
    if config.method == "skema":
        core = {"core"} if config.core == "full" else {"core_left", "core_right"}
        return frozenset(core | factors) if config.trainable_sketch else frozenset(core)
    return frozenset(factors | {"magnitude"}) if config.method == "dora" else frozenset(factors)


def is_projection(config: AdapterConfig, path: str) -> bool:
    """True if the leaf at this path belongs to a projection of SkeMA."""
    return config.method == "skema" and path.split("/")[-2:-1] in (["in"], ["out"])


def scale(config: AdapterConfig) -> float:
    """Factor of ΔW: α/rank for LoRA and DoRA, α/√rank for rsLoRA, α for SkeMA; 1 without alpha."""
    if config.alpha is None:
        return 1.0
    if config.method == "skema":
        return config.alpha
    return config.alpha / (math.sqrt(rank(config)) if config.method == "rslora" else rank(config))


def rank(config: AdapterConfig) -> int:
    """Rank of LoRA, rsLoRA and DoRA. Raises UserError if it is not set."""
    if config.rank is None or config.rank < 1:
        raise UserError(f"adapter.rank must be positive for {config.method}, got {config.rank}: set it, or a budget")
    return config.rank


def sketch_width(config: AdapterConfig) -> int:
    """Sketch width of SkeMA. Raises UserError if it is not set."""
    if config.sketch_width is None or config.sketch_width < 1:
        raise UserError(f"adapter.sketch_width must be positive for skema, got {config.sketch_width}: set it")
    return config.sketch_width


def _low_rank(config: AdapterConfig, target: Target) -> dict[str, AdapterLeaf]:
    """Leaves A and B of LoRA, initialised as in PEFT: A from U(-1/√I, 1/√I), B = 0."""
    size, bound = rank(config), target.in_features**-0.5

    def uniform(layer: int, shape: Shape, _: Any) -> jax.Array:
        return bound * jax.random.uniform(_key(config, target, layer, "in"), shape, jnp.float32, -1, 1)

    return {
        "in/matrix": AdapterLeaf((*_experts(target), target.in_features, size), jnp.float32, uniform),
        "out/matrix": AdapterLeaf((*_experts(target), size, target.out_features), jnp.float32, _constant(0.0)),
    }


def _sketch(config: AdapterConfig, target: Target) -> dict[str, AdapterLeaf]:
    """Leaves of SkeMA: projections, which the experts of a layer have in common, and a core for each expert."""
    width = sketch_width(config)
    found: dict[str, AdapterLeaf] = {}
    for side, size in (("in", target.in_features), ("out", target.out_features)):
        for name, (shape, dtype) in projections.shapes(config.projection, width, size).items():
            # x is multiplied with S_inᵀ from the right
            shape = shape[::-1] if side == "in" else shape
            found[f"{side}/{name}"] = AdapterLeaf(shape, dtype, partial(_projection, config, target, side, name))
    if config.core == "full":
        shapes, std = {"core": (width, width)}, config.core_std
    else:
        inner = config.core_rank or 0
        shapes = {"core_left": (width, inner), "core_right": (inner, width)}
        std = config.core_std or LOW_RANK_CORE_STD

    def noise(name: str, layer: int, shape: Shape, _: Any) -> jax.Array:
        return std * jax.random.normal(_key(config, target, layer, name), shape, jnp.float32)

    for name, shape in shapes.items():
        found[name] = AdapterLeaf((*_experts(target), *shape), jnp.float32, partial(noise, name))
    return found


def _projection(config: AdapterConfig, target: Target, side: str, name: str, layer: int, *_: Any) -> np.ndarray:
    size = target.in_features if side == "in" else target.out_features
    words = f"{target.path} {layer} {side}"
    made = projections.make(config.projection, sketch_width(config), size, config.seed, words)[name]
    return np.ascontiguousarray(made.T) if side == "in" else made


def _experts(target: Target) -> Shape:
    return () if target.experts is None else (target.experts,)


def _constant(value: float) -> Start:
    return lambda _, shape, __: jnp.full(shape, value, jnp.float32)


def _row_norms(target: Target, layer: int, shape: Shape, weight: Any) -> jax.Array:
    """‖w_o‖ of every output of a layer's matrix in fp32, [O]."""
    w = weights.dequantised(jax.tree.map(lambda leaf: leaf[layer], weight), jnp.float32)
    w_IO = w.reshape(target.in_features, *shape)
    return jnp.sqrt(jnp.sum(jnp.square(w_IO), axis=0))


def _key(config: AdapterConfig, target: Target, layer: int, name: str) -> jax.Array:
    words = f"{target.path} {layer} {name}"
    (seed,) = np.random.SeedSequence([config.seed, *words.encode()]).generate_state(1)
    return jax.random.key(int(seed))
