"""Table of the model families and of what is done with each, read from their modules."""

from collections.abc import Callable

from moe_reduce.families import FAMILIES
from moe_reduce.families.family import Family
from moe_reduce.families.parts import is_mixture, parts_of
from moe_reduce.reports import tables

YES, NO = "yes", "—"


def _reads(family: Family) -> str:
    return "safetensors" if family.gguf is None else "safetensors, GGUF"


def _exports(family: Family) -> str:
    return "itself, ONNX, StableHLO" + ("" if family.gguf is None else ", GGUF")


COLUMNS: dict[str, Callable[[Family], str]] = {
    "`model_type`": lambda family: f"`{family.name}`",
    "class in transformers": lambda family: f"`{family.architecture}`",
    "has": lambda family: ", ".join(parts_of(family)) or NO,
    "reads": _reads,
    "scores and prunes experts": lambda family: YES if is_mixture(family) else NO,
    "pools": lambda family: YES if is_mixture(family) else NO,
    "trains": lambda _: YES,
    "exports": _exports,
    "leaves out": lambda family: "layers that predict further tokens" if family.next_tokens else NO,
}


def markdown() -> str:
    """The table as Markdown; our own family, which represents every model, is left out."""
    published = [family for family in FAMILIES if family.name != FAMILIES[-1].name]
    return tables.markdown([list(COLUMNS), *([cell(family) for cell in COLUMNS.values()] for family in published)])
