"""Which linear maps an adapter changes, and how many parameters that trains. I inputs, O outputs, R rank, k sketch."""

import bisect
import dataclasses
from dataclasses import dataclass

from moe_reduce.adapters import projections
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import abstract_params

ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "output"}
FEED_FORWARD = ("gate", "up", "down")
PRESETS = {"attention": tuple(ATTENTION), "mlp": FEED_FORWARD}


@dataclass(frozen=True)
class Target:
    """One leaf of the base whose matrices the adapter changes."""

    path: str
    inputs: int
    outputs: int
    experts: int | None  # matrices side by side in the leaf; None: one
    layers: tuple[int, ...] | None  # that are changed, ascending; None: the leaf has no layers, as a shared pool

    @property
    def maps(self) -> int:
        """Matrices that are changed, each by a core of its own."""
        return (1 if self.layers is None else len(self.layers)) * (self.experts or 1)


def targets_of(config: AdapterConfig, model: ModelConfig) -> tuple[Target, ...]:
    """The targets that `targets` and `layers` name; raises UserError at the first that the model does not have."""
    shapes = {path: leaf.shape for path, leaf in trees.flatten(abstract_params(model)).items()}
    found: dict[str, Target] = {}
    for word in config.targets.split(","):
        name, at, layers = word.strip().partition("@")
        for member in PRESETS.get(name, (name,)):
            path = _path(member, model)
            if path not in shapes and name in PRESETS:
                continue  # a feed-forward block of two matrices has no gate
            if path not in shapes:
                known = ", ".join((*ATTENTION, *FEED_FORWARD, *PRESETS))
                raise UserError(f"adapter.targets: the model has no {word!r}; known: {known}")
            if path in found:
                raise UserError(f"adapter.targets={config.targets} names {member} twice: name it once")
            if at and not path.startswith("layers/"):
                raise UserError(f"adapter.targets: {word!r} names layers, and the pool belongs to all: write {name}")
            chosen = _layers(layers or config.layers, model.layers) if path.startswith("layers/") else None
            found[path] = _target(path, shapes[path], chosen)
    return tuple(found[path] for path in sorted(found))


def _path(name: str, model: ModelConfig) -> str:
    if name in ATTENTION:
        return f"layers/attention/{ATTENTION[name]}"
    if model.moe is None:
        return f"layers/mlp/{name}"
    return f"experts/{name}" if model.moe.placement == "shared" else f"layers/experts/{name}"


def _target(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None) -> Target:
    inner = shape if layers is None else shape[1:]
    if path.endswith("attention/output"):
        return Target(path, inner[0] * inner[1], inner[2], None, layers)
    if "attention/" in path:
        return Target(path, inner[0], inner[1] * inner[2], None, layers)
    return Target(path, inner[-2], inner[-1], inner[0] if len(inner) == 3 else None, layers)


def _layers(text: str, total: int) -> tuple[int, ...]:
    """Of `all`, `top:L` (the last L), `every:s` (each s-th, the last among them) or `3+5`."""
    kind, _, number = text.partition(":")
    try:
        if text == "all":
            return tuple(range(total))
        if kind == "top" and 1 <= int(number) <= total:
            return tuple(range(total - int(number), total))
        if kind == "every" and 1 <= int(number) <= total:
            return tuple(range(total - 1, -1, -int(number)))[::-1]
        chosen = tuple(int(part) for part in text.split("+"))
        if len(set(chosen)) == len(chosen) and all(0 <= layer < total for layer in chosen):
            return tuple(sorted(chosen))
    except ValueError:
        pass
    raise UserError(f"adapter.layers={text!r} must be all, top:L, every:s or numbers such as 3+5, of {total} layers")


def parameters(config: AdapterConfig, target: Target) -> int:
    """Trained parameters of one target, exactly."""
    both = target.inputs + target.outputs
    shared = 1 if target.layers is None else len(target.layers)
    if config.method != "skema":
        magnitude = target.outputs if config.method == "dora" else 0
        return target.maps * (rank_of(config) * both + magnitude)
    width = width_of(config)
    core = width**2 if config.core == "full" else 2 * width * (config.core_rank or 0)
    return target.maps * core + (shared * width * both if config.trainable_sketch else 0)


def rank_of(config: AdapterConfig) -> int:
    """r, for methods that have one; raises UserError without."""
    if config.rank is None or config.rank < 1:
        raise UserError(f"adapter.rank must be positive for {config.method}, got {config.rank}: set it, or a budget")
    return config.rank


def width_of(config: AdapterConfig) -> int:
    """k of SkeMA; raises UserError without."""
    if config.sketch_width is None or config.sketch_width < 1:
        raise UserError(f"adapter.sketch_width must be positive for skema, got {config.sketch_width}: set it")
    return config.sketch_width


def within_budget(config: AdapterConfig, model: ModelConfig, parameters_allowed: int) -> AdapterConfig:
    """The config with the largest rank or sketch width that the targets can have, within so many trained parameters.

    For maps d -> m: r = P/(d+m), k = √P. Raises UserError when even 1 is too much.
    """
    found = targets_of(config, model)
    name = "sketch_width" if config.method == "skema" else "rank"
    narrowest = min(min(target.inputs, target.outputs) for target in found)
    largest = projections.largest(config.projection, narrowest) if config.method == "skema" else narrowest

    def cost(size: int) -> int:
        tried = dataclasses.replace(config, **{name: size})
        return sum(parameters(tried, target) for target in found)

    if cost(1) > parameters_allowed:
        raise UserError(f"budget: {parameters_allowed:,} parameters do not pay for {name}=1, which takes {cost(1):,}")
    sizes = range(1, int(min(largest, parameters_allowed)) + 1)  # a size costs a parameter at least
    size = bisect.bisect_right(sizes, parameters_allowed, key=cost)
    return dataclasses.replace(config, **{name: size})
