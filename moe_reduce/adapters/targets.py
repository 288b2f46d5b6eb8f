"""Targets: the parameters that an adapter changes, selected by `adapter.targets` and `adapter.layers`."""

from dataclasses import dataclass

from moe_reduce.core.config import AdapterConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import Parameter, parameters

# word -> name of the parameter; words of latent and linear attention and of the block beside experts are our own
NAMES = {
    "q": "query", "k": "key", "v": "value", "o": "output", "q_down": "query_down", "q_up": "query_up",
    "kv_down": "latent", "kv_up": "latent_up", "gate": "gate", "up": "up", "down": "down", "shared_gate": "gate",
    "shared_up": "up", "shared_down": "down", "router": "weight", "linear_in": "inputs", "linear_rates": "rates",
    "linear_gate": "gate", "linear_beta": "beta", "linear_decay": "decay", "linear_out": "output",
}  # fmt: skip
PRESETS = {
    "attention": (
        "q", "k", "v", "o", "q_down", "q_up", "kv_down", "kv_up", "linear_in", "linear_rates", "linear_gate",
        "linear_beta", "linear_decay", "linear_out",
    ),
    "mlp": ("gate", "up", "down", "shared_gate", "shared_up", "shared_down"),
}  # fmt: skip
COMPONENTS = ("attention", "feed_forward", "experts", "router")
PREFIXES = {"shared_": "shared_expert", "linear_": "linear_attention"}  # of words -> component that they name


@dataclass(frozen=True)
class Target:
    """A parameter whose matrices the adapter changes, and the layers in which they change.

    layers: places in the parameter's stack of layers, ascending; None for a parameter that has no layer axis, such as a
    shared pool's experts.
    """

    parameter: Parameter
    layers: tuple[int, ...] | None

    @property
    def path(self) -> str:
        """Path of the parameter."""
        return self.parameter.path

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the layers in the model."""
        return tuple(self.parameter.layers[place] for place in self.layers or ())

    @property
    def in_features(self) -> int:
        """Inputs of one matrix."""
        return self.parameter.matrix_shape[0]

    @property
    def out_features(self) -> int:
        """Outputs of one matrix."""
        return self.parameter.matrix_shape[1]

    @property
    def router(self) -> bool:
        """True for a router."""
        return self.parameter.component == "router"

    @property
    def experts(self) -> int | None:
        """Number of experts, each with a matrix of its own; None for a single matrix."""
        axis = self.parameter.expert_axis if self.parameter.per_expert else None
        return None if axis is None else self.parameter.shape[axis]


def every_target(model: ModelConfig) -> tuple[Target, ...]:
    """All targets that an adapter of this model can have, in all of their layers."""
    words = "attention,mlp" if model.moe is None else "attention,mlp,router"
    return targets_of(AdapterConfig(targets=words), model)


def targets_of(config: AdapterConfig, model: ModelConfig) -> tuple[Target, ...]:
    """Targets of an adapter, in path order. Raises UserError for a word or a layer that the model lacks."""
    found: dict[str, Target] = {}
    for word in config.targets.split(","):
        name, at, layers = word.strip().partition("@")
        for member in PRESETS.get(name, (name,)):
            parameters_of = _parameters(member, model)
            if not parameters_of and name in PRESETS:
                continue  # a GELU block has no gate
            if not parameters_of:
                known = ", ".join((*NAMES, *PRESETS))
                raise UserError(f"adapter.targets: the model has no {word!r}; known: {known}")
            chosen, known = _layers(layers or config.layers, model.layers), len(found)
            for parameter in parameters_of:
                if at and not parameter.stacked:
                    raise UserError(
                        f"adapter.targets: {word!r} names layers, but the pool belongs to all layers: write {name}"
                    )
                target = Target(parameter, _places(parameter, chosen))
                if target.layers == ():
                    continue  # the layers are in another stack
                if parameter.path in found:
                    raise UserError(f"adapter.targets={config.targets} names {member} twice: name it once")
                found[parameter.path] = target
            if len(found) == known and name not in PRESETS:
                raise UserError(f"adapter.targets: the model has no {member!r} in these layers: {word!r}")
    return tuple(found[path] for path in sorted(found))


def word_of(target: Target) -> str:
    """The word for this target in `adapter.targets`, such as q@0+3."""
    parameter = target.parameter
    word = next(
        word for word, name in NAMES.items() if name == parameter.name and parameter.component in _components(word)
    )
    return word if target.layers is None else f"{word}@{'+'.join(map(str, target.numbers))}"


def _components(word: str) -> tuple[str, ...]:
    return next(((component,) for prefix, component in PREFIXES.items() if word.startswith(prefix)), COMPONENTS)


def _parameters(word: str, model: ModelConfig) -> list[Parameter]:
    """Parameters that a word names: one for each stack of layers that has it."""
    return [
        record
        for record in parameters(model)
        if record.is_matrix and record.component in _components(word) and record.name == NAMES.get(word)
    ]


def _places(parameter: Parameter, layers: tuple[int, ...]) -> tuple[int, ...] | None:
    """Places in the parameter's stack of those layers that are in it; None without a stack."""
    if not parameter.stacked:
        return None
    return tuple(place for place, layer in enumerate(parameter.layers) if layer in layers)


def _layers(text: str, total: int) -> tuple[int, ...]:
    """Layer numbers for `all`, `top:L` (the last L), `every:s` (each s-th, ending with the last) or `3+5`."""
    kind, _, number = text.partition(":")
    try:
        if text == "all":
            return tuple(range(total))
        if kind == "top" and 1 <= int(number) <= total:
            return tuple(range(total - int(number), total))
        if kind == "every" and 1 <= int(number) <= total:
            return tuple(range(total - 1, -1, -int(number)))[::-1]
        chosen = tuple(int(layer) for layer in text.split("+"))
        if len(set(chosen)) == len(chosen) and all(0 <= layer < total for layer in chosen):
            return tuple(sorted(chosen))
    except ValueError:
        pass
    raise UserError(f"adapter.layers={text!r} must be all, top:L, every:s or numbers such as 3+5, of {total} layers")
