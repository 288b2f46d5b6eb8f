"""--adapter of the commands that run a model: adapters are computed beside the model's matrices, not merged."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_reduce.core.disk import restored
from moe_reduce.core.errors import UserError

if TYPE_CHECKING:
    from moe_reduce.adapters.adapter import Adapter
    from moe_reduce.models.model import Model

NONE = "none"  # value for the model as it is


def add_adapter(parser: argparse.ArgumentParser, each: str | None = None) -> None:
    """Adds --adapter. each: the option beside which --adapter may be repeated; None if it is given once."""
    shown = "an adapter directory written by adapt or by PEFT, to run beside --model without merging"
    if each is None:
        parser.add_argument("--adapter", help=shown)
        return
    shown += f"; repeated, one for each {each}, in order ({NONE}: no adapter)"
    parser.add_argument("--adapter", action="append", default=[], help=shown)


def one_for_each(adapters: Sequence[str], count: int, option: str) -> list[str]:
    """--adapter of each of `count` uses of an option: the only value given, or the values in order."""
    if not adapters:
        return [NONE] * count
    if len(adapters) == 1 and count:
        return list(adapters) * count
    if len(adapters) != count:
        raise UserError(
            f"there are {len(adapters)} --adapter and {count} {option}: give one adapter for all, or one for each "
            f"({NONE}: no adapter)"
        )
    return list(adapters)


def check_adapters(adapters: Iterable[str]) -> None:
    """Raises UserError for the first adapter that is no directory."""
    for adapter in adapters:
        if adapter != NONE and not restored(Path(adapter)).is_dir():
            raise UserError(f"--adapter={adapter} is not a directory: give one that adapt or PEFT wrote")


def with_adapter(model: "Model", adapter: str | None, base: Path, tensor: int = 1) -> "Model":
    """The model with an adapter active beside its matrices; raises UserError if the adapter is not one of this base."""
    from moe_reduce.adapters.adapter import activate

    found = None if adapter is None else _load(adapter, model, base, tensor)
    return model if found is None else activate(model, found)


def with_adapters(
    model: "Model", adapters: Sequence[str], base: Path, tensor: int = 1
) -> tuple["Model", list[int] | None]:
    """(the model with the adapters active, the entry of each in its bank; None if all are the same one)."""
    from moe_reduce.adapters import bank

    distinct = list(dict.fromkeys(adapters))
    if len(distinct) == 1:
        return with_adapter(model, distinct[0], base, tensor), None
    loaded = [_load(adapter, model, base, tensor) for adapter in distinct]
    for adapter, found in zip(distinct, loaded, strict=True):
        if found is not None and found.config.method == "dora":
            raise UserError(
                f"--adapter={adapter} is a DoRA, which cannot run beside others: give it alone, or merge it"
            )
    return bank.activate(model, loaded), [distinct.index(adapter) for adapter in adapters]


def _load(adapter: str, model: "Model", base: Path, tensor: int) -> "Adapter | None":
    if adapter == NONE:
        return None
    from moe_reduce.adapters import adapter_directory
    from moe_reduce.adapters.checks import check_split
    from moe_reduce.storage import manifest

    check_adapters([adapter])
    found = adapter_directory.load(Path(adapter), model.config, manifest.input_of(base))
    check_split(found.config, model.config, tensor)
    return found
