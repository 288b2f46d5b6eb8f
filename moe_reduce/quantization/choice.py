"""The scheme of each component, from a text such as int4,attention=int8,router=keep."""

from collections.abc import Collection

from moe_reduce.core import schemes
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import KEEP, Scheme
from moe_reduce.models.parameters import counts_by_component
from moe_reduce.quantization.round_to_nearest import every_component


def choose(config: ModelConfig, text: str, keep: Collection[str], what: str) -> dict[str, Scheme]:
    """The scheme of each component that is quantised.

    text: as schemes.split takes it; a scheme without a component is for all that have matrices and are not in `keep`.
    what: the option that gives the text, for messages. Raises UserError for a component that the model lacks, an
    unknown scheme, and a text that quantises nothing.
    """
    known = counts_by_component(config)
    usual, named = schemes.split(text)
    for component in named:
        if component not in known:
            raise UserError(f"{what}: the model has no component {component!r}; it has {', '.join(known)}")
    found = {} if usual is None else every_component(config, schemes.parse(usual), keep)
    for component, name in named.items():
        if name == KEEP:
            found.pop(component, None)
        else:
            found[component] = schemes.parse(name)
    if not found:
        raise UserError(f"{what}={text} quantises nothing: name a scheme, such as int8 or int4-g64")
    return found
