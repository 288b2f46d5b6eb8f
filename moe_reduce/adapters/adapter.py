"""An adapter as a tree of its own: how it starts, which of its leaves train, and how it joins a base.

Below params["adapter"], under the path of the matrix that it changes, lies what models/deltas.py describes, stacked
over the layers that it changes; `layer_numbers` says which. For LoRA on the queries of layers 1 and 3:

    adapter/layers/attention/query/in/matrix    [2, D, R]
                                  /out/matrix   [2, R, H·C]
                                  /scale        [2]
                                  /layer_numbers  [1, 3]
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import projections
from moe_reduce.adapters.targets import Target, rank_of, targets_of, width_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model

LOW_RANK_CORE_STD = 1e-3  # of both factors of M, where core_std is not given
TRAINED = {
    "lora": r".*/(in|out)/matrix",
    "rslora": r".*/(in|out)/matrix",
    "dora": r".*/((in|out)/matrix|magnitude)",
    "skema": r".*/core(_left|_right)?",
}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter is, whatever trained it."""

    config: AdapterConfig
    tree: dict[str, Any]  # as below params["adapter"]


def init(config: AdapterConfig, model: Model) -> Adapter:
    """An adapter that changes nothing yet (next to nothing with a low-rank core); real or abstract parameters alike.

    Raises UserError when the config does not fit the model.
    """
    planned = abstract(config, model.config)
    flat = trees.flatten(model.params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat.values()):
        return Adapter(config, planned)
    leaves: dict[str, Any] = {}
    for target in targets_of(config, model.config):
        for name, leaf in _start(config, target, flat[target.path]).items():
            leaves[f"{target.path}/{name}"] = leaf
    return Adapter(config, trees.unflatten(leaves))


def trained(config: AdapterConfig, path: str) -> bool:
    """Whether the leaf of the adapter at this path, below or without `adapter/`, trains."""
    pattern = TRAINED[config.method]
    if config.method == "skema" and config.trainable_sketch:
        pattern += r"|.*/(in|out)/matrix"
    return re.fullmatch(pattern, path) is not None


def count(adapter: Adapter) -> int:
    """Trained parameters, exactly."""
    flat = trees.flatten(adapter.tree)
    return sum(math.prod(leaf.shape) for path, leaf in flat.items() if trained(adapter.config, path))


def activate(model: Model, adapter: Adapter) -> Model:
    """The model with the adapter at work beside its parameters; `merging.merge` makes it a plain model again."""
    if ADAPTER in model.params:
        raise UserError("an adapter is active in this model already: merge or unmerge it first")
    check_fits(adapter, model.config)
    return dataclasses.replace(model, params=model.params | {ADAPTER: adapter.tree})


def check_fits(adapter: Adapter, model: ModelConfig) -> None:
    """Raises UserError at the first leaf that the adapter has and the model cannot use, or has another shape."""
    check(adapter.config, model)
    wanted = _leaves(adapter.config, model)
    found = trees.flatten(adapter.tree)
    for path in sorted(set(wanted) ^ set(found)):
        state = "is missing from the adapter" if path in wanted else "has no place in this model"
        raise UserError(f"adapter leaf {path} {state}: give the adapter of this base")
    for path, leaf in found.items():
        if tuple(leaf.shape) != wanted[path].shape:
            raise UserError(f"adapter leaf {path} has shape {tuple(leaf.shape)}, this base needs {wanted[path].shape}")


def check_split(config: AdapterConfig, model: ModelConfig, tensor: int) -> None:
    """Raises UserError for an adapter of what is split over so many devices of mesh.tensor, and cannot be."""
    if tensor > 1 and config.projection == "srht" and any(target.experts for target in targets_of(config, model)):
        raise UserError("adapter.projection=srht mixes the whole width of an expert, which mesh.tensor > 1 splits")


def abstract(config: AdapterConfig, model: ModelConfig) -> dict[str, Any]:
    """Shapes of an adapter's leaves, without making a projection; raises UserError as `init` does."""
    check(config, model)
    for target in targets_of(config, model):
        smallest = min(target.inputs, target.outputs)
        if config.rank is not None and config.rank > smallest:  # PEFT's own files may waste parameters
            raise UserError(f"adapter.rank ({config.rank}) exceeds {smallest}, a size of {target.path}: lower it")
    return trees.unflatten(_leaves(config, model))


def _leaves(config: AdapterConfig, model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """By path below params["adapter"]."""
    return {
        f"{target.path}/{name}": jax.ShapeDtypeStruct(shape, dtype)
        for target in targets_of(config, model)
        for name, (shape, dtype) in _shapes(config, target).items()
    }


def _shapes(config: AdapterConfig, target: Target) -> dict[str, tuple[tuple[int, ...], Any]]:
    stack = () if target.layers is None else (len(target.layers),)
    own = (*stack, *(() if target.experts is None else (target.experts,)))
    sizes = {"in": target.inputs, "out": target.outputs}
    found: dict[str, tuple[tuple[int, ...], Any]] = {"scale": (stack, jnp.float32)}
    if stack:
        found["layer_numbers"] = (stack, jnp.int32)
    if config.method != "skema":
        rank = rank_of(config)
        found |= {"in/matrix": ((*own, target.inputs, rank), jnp.float32)}
        found |= {"out/matrix": ((*own, rank, target.outputs), jnp.float32)}
        if config.method == "dora":
            found |= {"magnitude": ((*stack, target.outputs), jnp.float32), "present": (stack, jnp.float32)}
        return found
    width = width_of(config)
    for side, size in sizes.items():
        if config.projection == "srht":
            found[f"{side}/signs"] = ((*stack, projections.padded_size(size)), jnp.float32)
            found[f"{side}/rows"] = ((*stack, width), jnp.int32)
        else:
            found[f"{side}/matrix"] = ((*stack, *((size, width) if side == "in" else (width, size))), jnp.float32)
    if config.core == "full":
        return found | {"core": ((*own, width, width), jnp.float32)}
    inner = config.core_rank or 0
    return found | {
        "core_left": ((*own, width, inner), jnp.float32),
        "core_right": ((*own, inner, width), jnp.float32),
    }


def scale_of(config: AdapterConfig) -> float:
    """What multiplies ΔW: α/r of LoRA and DoRA, α/√r of rsLoRA, α of SkeMA; 1 without alpha."""
    if config.alpha is None:
        return 1.0
    if config.method == "skema":
        return config.alpha
    rank = rank_of(config)
    return config.alpha / (math.sqrt(rank) if config.method == "rslora" else rank)


def check(config: AdapterConfig, model: ModelConfig) -> None:
    """Raises UserError for what no adapter of this model can be, made here or read from files."""
    skema = config.method == "skema"
    for name, wanted in (("rank", not skema), ("sketch_width", skema)):
        if getattr(config, name) is not None and not wanted:
            raise UserError(f"adapter.{name} is not for {config.method}: leave it None")
    if skema and (config.core == "low_rank") != (config.core_rank is not None):
        raise UserError(f"adapter.core={config.core} and adapter.core_rank={config.core_rank}: low_rank needs a rank")
    if config.trainable_sketch and (not skema or config.projection == "srht"):
        raise UserError("adapter.trainable_sketch is for skema with orthonormal or gaussian projections")
    for name, least in (("core_std", 0), ("seed", 0), ("core_rank", 1)):
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"adapter.{name} must be at least {least}, got {value}")
    if config.alpha is not None and not 0 < config.alpha < math.inf:
        raise UserError(f"adapter.alpha must be positive, got {config.alpha}")
    found = targets_of(config, model)
    if config.method == "dora" and any(target.experts for target in found):
        raise UserError("dora is for single matrices, and these targets are experts: choose lora or skema")
    for target in found:
        for size in (target.inputs, target.outputs) if skema else ():
            projections.check(config.projection, width_of(config), size, target.path)


def _start(config: AdapterConfig, target: Target, leaf: Any) -> dict[str, Any]:
    """The leaves of one target, by path below it."""
    layers = (0,) if target.layers is None else target.layers
    stack = () if target.layers is None else (len(layers),)
    made = _sketch(config, target, layers) if config.method == "skema" else _low_rank(config, target, layers)
    made["scale"] = jnp.full((len(layers),), scale_of(config), jnp.float32)
    if config.method == "dora":
        made["magnitude"] = _lengths(leaf[np.asarray(layers)], target)
        made["present"] = jnp.ones((len(layers),), jnp.float32)
    made = {name: value.reshape(*stack, *value.shape[1:]) for name, value in made.items()}
    if target.layers is not None:
        made["layer_numbers"] = jnp.asarray(layers, jnp.int32)
    return made


def _key(config: AdapterConfig, target: Target, layer: int, part: str) -> jax.Array:
    name = f"{target.path} {layer} {part}"
    (word,) = np.random.SeedSequence([config.seed, *name.encode()]).generate_state(1)
    return jax.random.key(int(word))


def _low_rank(config: AdapterConfig, target: Target, layers: tuple[int, ...]) -> dict[str, Any]:
    """B = 0 and A as a linear layer of PyTorch starts, U(-1/√I, 1/√I), as PEFT has it."""
    rank = rank_of(config)
    experts = () if target.experts is None else (target.experts,)
    bound = target.inputs**-0.5
    inward = [
        jax.random.uniform(_key(config, target, layer, "in"), (*experts, target.inputs, rank), jnp.float32, -1, 1)
        for layer in layers
    ]
    outward = jnp.zeros((len(layers), *experts, rank, target.outputs), jnp.float32)
    return {"in/matrix": bound * jnp.stack(inward), "out/matrix": outward}


def _sketch(config: AdapterConfig, target: Target, layers: tuple[int, ...]) -> dict[str, Any]:
    """Projections, which the experts of a layer share, and cores, of which each has its own."""
    width = width_of(config)
    experts = () if target.experts is None else (target.experts,)
    found: dict[str, Any] = dict(projected(config, target))

    def noise(part: str, shape: tuple[int, ...], std: float) -> jax.Array:
        keys = [_key(config, target, layer, part) for layer in layers]
        return jnp.stack([std * jax.random.normal(key, (*experts, *shape), jnp.float32) for key in keys])

    if config.core == "full":
        found["core"] = noise("core", (width, width), config.core_std)
    else:
        assert config.core_rank is not None
        std = config.core_std or LOW_RANK_CORE_STD
        found["core_left"] = noise("core_left", (width, config.core_rank), std)
        found["core_right"] = noise("core_right", (config.core_rank, width), std)
    return found


def projected(config: AdapterConfig, target: Target) -> dict[str, np.ndarray]:
    """The projections of one target of SkeMA, by path below it, stacked over its layers (one where it has none)."""
    layers = (0,) if target.layers is None else target.layers
    found: dict[str, np.ndarray] = {}
    for side, size in (("in", target.inputs), ("out", target.outputs)):
        parts = [
            projections.make(config.projection, width_of(config), size, config.seed, f"{target.path} {layer} {side}")
            for layer in layers
        ]
        for name in parts[0]:
            stacked = np.stack([part[name] for part in parts])
            # rows of x are multiplied from the left: S_inᵀ [I, k]; and S_out as it is [k, O]
            turned = side == "in" and name == "matrix"
            found[f"{side}/{name}"] = np.ascontiguousarray(np.swapaxes(stacked, 1, 2)) if turned else stacked
    return found


def _lengths(leaf: jax.Array, target: Target) -> jax.Array:
    """‖w_o‖ of every output in fp32, [n, O]."""
    w_NIO = leaf.astype(jnp.float32).reshape(leaf.shape[0], target.inputs, target.outputs)
    return jnp.sqrt(jnp.sum(jnp.square(w_NIO), axis=1))
