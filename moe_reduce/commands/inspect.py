"""moe-reduce inspect: describe a model directory and its history, from file headers unless --verify is given."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_reduce.commands import model_arguments
from moe_reduce.core.errors import UserError
from moe_reduce.models.parameters import counts_by_component, parameter_count

if TYPE_CHECKING:
    from moe_reduce.core.provenance import Input, Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--model", required=True, type=Path, help="a model directory, ours or from Hugging Face, or a .gguf file"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every file and check all hashes of the manifest and its history"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace, overrides: list[str]) -> str:
    """Returns the description."""
    model_arguments.no_overrides(overrides)
    return model_arguments.show(describe(arguments.model, arguments.verify), arguments.json)


def describe(directory: Path, verify: bool) -> dict[str, Any]:
    """Architecture, tensors and history of a model directory; raises UserError when a part of it is missing."""
    from moe_reduce.core.config import to_dict
    from moe_reduce.families import MODEL_TYPE, of_config, read_config
    from moe_reduce.storage import manifest
    from moe_reduce.storage.parameter_tensors import check_names, open_tensors

    config, _ = read_config(directory)
    files = open_tensors(directory, config)
    check_names(files, config)
    content: dict[str, Any] = {
        "model": str(directory),
        MODEL_TYPE: of_config(config).name,
        "architecture": to_dict(config),
        "parameters": parameter_count(config),
        "by_component": counts_by_component(config),
        "dtypes": sorted({str(entry.dtype) for entry in files.entries.values()}),
        "bytes": sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in files.entries.values()),
        "tensors": len(files.entries),
        "chain": [_link(step, directory, verify) for step in manifest.read_chain(directory)],
    }
    if verify:
        if not (directory / manifest.MANIFEST_FILE).is_file():
            raise UserError(f"{directory} has no {manifest.MANIFEST_FILE} to check against: leave out --verify")
        problems = manifest.verify(directory)
        if problems:
            raise UserError(f"{directory} does not match its manifest: {'; '.join(problems)}")
        content["verified"] = "every file has the hash that manifest.json gives"
    return content


def _link(step: "Step", directory: Path, verify: bool) -> str:
    quality = "" if not step.quality else f", validation {step.quality}"
    origins = ", ".join(f"{entry.path} ({_state(entry, directory)})" if verify else entry.path for entry in step.inputs)
    counts = f"{step.parameters_before:,} -> {step.parameters_after:,} parameters"
    return f"{step.command}: {counts}{quality}" + (f", from {origins}" if origins else "")


def _place(path: Path, directory: Path) -> Path:
    """Path of an input. Relative paths are tried from the present directory and from every parent of the model."""
    found = (above / path for above in directory.resolve().parents if (above / path).exists())
    return path if path.exists() else next(found, path)


def _state(entry: "Input", directory: Path) -> str:
    """State of a step's input (a model directory, an adapter or a file): unchanged, changed since, or not found."""
    from moe_reduce.adapters.adapter_directory import DESCRIPTION, described
    from moe_reduce.storage import manifest

    place, sampled = _place(Path(entry.path), directory), False
    try:
        if place.is_file():
            found = manifest.sha256_of_file(place)
        elif (place / DESCRIPTION).is_file():
            found = described(place)["digest"]
        elif (place / "config.json").is_file():
            sampled = not (place / manifest.MANIFEST_FILE).is_file()
            unchanged = sampled or not manifest.verify(place)
            found = manifest.input_of(place).sha256 if unchanged else ""
        else:
            return "not found" if not place.exists() else "cannot be checked"
    except (UserError, OSError):
        return "changed since"
    if found != entry.sha256:
        return "changed since"
    return "unchanged, by samples" if sampled else "unchanged"
