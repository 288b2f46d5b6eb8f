"""--hypernetwork and --task: adapters that a hypernetwork writes from descriptions."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_reduce.core.errors import UserError

CACHE = Path("runs/written_adapters")


def add_hypernetwork(parser: argparse.ArgumentParser, each: str | None = None) -> None:
    """Adds --hypernetwork, --task and --adapter-cache. each: as in `adapter_arguments.add_adapter`."""
    parser.add_argument(
        "--hypernetwork",
        type=Path,
        help="a directory written by text-to-lora; --task describes what its adapter is for",
    )
    shown = "description of a task, from which --hypernetwork writes an adapter"
    shown += "" if each is None else f"; repeated, one for each {each}, in order"
    parser.add_argument("--task", action="append", default=[], metavar="DESCRIPTION", help=shown)
    parser.add_argument(
        "--adapter-cache",
        type=Path,
        default=CACHE,
        help="directory in which written adapters and embeddings are kept (default: %(default)s)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError if only one of the two is given."""
    if (arguments.hypernetwork is None) != (not arguments.task):
        raise UserError("--hypernetwork=DIR writes adapters for --task=DESCRIPTION: give both, or none")


def written(arguments: argparse.Namespace, base: Path) -> list[Path]:
    """Directories of the adapters for each --task, written now or found in the cache.

    Raises UserError for an empty description, another base, and a hypernetwork that reads no descriptions.
    """
    from moe_reduce.adapters.hypernetwork import directory
    from moe_reduce.adapters.hypernetwork.encoders import OneHot, check_texts, open_encoder
    from moe_reduce.storage import manifest

    tasks: Sequence[str] = arguments.task
    check_texts(tasks)
    trained = directory.load(arguments.hypernetwork, manifest.input_of(base))
    name = trained.encoder["name"]
    if name.endswith(OneHot.name):
        raise UserError(
            f"{arguments.hypernetwork} was trained on task numbers ({name}), so it reads no description: give one that "
            "was trained with conditioning=text"
        )
    return directory.write_adapters(
        trained, list(tasks), open_encoder(name, arguments.adapter_cache), arguments.adapter_cache
    )
