"""manifest.json: the history of a model directory, its parameter counts, and the SHA-256 of each of its files."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from moe_reduce.core import json_files
from moe_reduce.core.config import ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input, Step
from moe_reduce.models.parameters import counts_by_component

MANIFEST_FILE = "manifest.json"
PACKAGES = ("moe_reduce", "jax", "flax", "numpy", "safetensors")
SAMPLES, SAMPLE_BYTES = 64, 16 * 1024  # hashed from each weight file of a directory without a manifest
WEIGHT_PATTERN = "model*.safetensors*"


def sha256_of_file(file: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def input_of(directory: Path) -> Input:
    """Path and hash by which a step of the history names a model directory, or a GGUF file, that it read.

    The hash is that of the file, or of the directory's manifest.json. Published directories have none: their hash is a
    fingerprint of config.json and of each weight file, made of its size and 64 samples of 16 KiB spread over its
    length, header included. Reading every byte of a large model would take longer than most steps.
    """
    if directory.is_file():
        return Input(str(directory), sha256_of_file(directory))
    manifest = directory / MANIFEST_FILE
    if manifest.is_file():
        return Input(str(directory), sha256_of_file(manifest))
    digest = hashlib.sha256()
    for file in [*directory.glob("config.json"), *sorted(directory.glob(WEIGHT_PATTERN))]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(sample * max(file.stat().st_size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return Input(str(directory), digest.hexdigest())


def write(
    directory: Path,
    config: ModelConfig,
    chain: tuple[Step, ...],
    hashes: Mapping[str, str],
    reports: Collection[str] = (),
) -> None:
    """Write manifest.json for the files of a directory. hashes: SHA-256 by name, of files already hashed.

    reports: names of files with dates and times, which are listed without a hash: the manifest of a second run, whose
    hash names the directory, must be equal.
    """
    found = {file.name for file in directory.iterdir() if file.is_file()} - {MANIFEST_FILE}
    names = sorted(found - {*reports})
    components = counts_by_component(config)
    content = {
        "versions": versions() | {"python": platform.python_version()},
        "commit": commit(),
        "files": {name: hashes[name] if name in hashes else sha256_of_file(directory / name) for name in names},
        "parameters": components | {"total": sum(components.values())},
        "chain": [asdict(step) for step in chain],
    } | ({"reports": sorted(reports)} if reports else {})
    (directory / MANIFEST_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    """The content of manifest.json; None in a directory without one, such as a published model."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        return None
    content = json_files.read_object(file, "restore or remove it")
    for name, kind in (("files", dict), ("chain", list)):
        if name not in content:
            raise UserError(f"{file} has no {name}: restore or remove it")
        if not isinstance(content[name], kind):
            raise UserError(f"{file}: files must be an object and chain a list: restore or remove it")
    return content


def read_chain(directory: Path) -> tuple[Step, ...]:
    """The steps that made a model directory, oldest first; empty without a manifest."""
    content = read(directory)
    if content is None:
        return ()
    try:
        return tuple(_step(item) for item in content["chain"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory / MANIFEST_FILE} has an unreadable chain ({error!r}): restore the file, or remove it to begin "
            "a new history"
        ) from None


def _step(item: dict[str, Any]) -> Step:
    """A step of the chain; KeyError, TypeError or ValueError if it is not one that was written."""
    values = {field.name: item[field.name] for field in fields(Step)}
    values["inputs"] = tuple(Input(entry["path"], entry["sha256"]) for entry in item["inputs"])
    for name, kind in (("command", str), ("arguments", dict), ("parameters_before", int), ("parameters_after", int)):
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {values[name]!r}")
    for entry in values["inputs"]:
        if not (isinstance(entry.path, str) and isinstance(entry.sha256, str)):
            raise ValueError(f"inputs must hold paths and hashes, got {entry}")
    kept = values["kept_experts"]
    if kept == []:
        raise ValueError("kept_experts is empty")
    for pair in [pair for row in kept for pair in row] if kept is not None else ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)):
            raise ValueError(f"kept_experts must hold rows of [layer, index], got {pair!r}")
    return Step(**values)


def verify(directory: Path) -> list[str]:
    """Differences from manifest.json, one line each; empty when every file is present and unchanged."""
    content = read(directory)
    if content is None:
        return [f"{directory} has no {MANIFEST_FILE}"]
    problems = []
    for name, expected in sorted(content["files"].items()):
        file = directory / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif sha256_of_file(file) != expected:
            problems.append(f"{file} has changed: its SHA-256 is not the one in {MANIFEST_FILE}")
    weights = {file.name for file in directory.glob(WEIGHT_PATTERN)}
    return problems + [
        f"{directory / name} is not in {MANIFEST_FILE}" for name in sorted(weights - {*content["files"]})
    ]


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of packages; None for one that is not installed, such as this package run from a checkout."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Commit of the checkout that this package runs from, with "-dirty" if files differ; None outside a checkout."""
    package = Path(__file__).resolve().parent
    # An installed copy may lie inside another project's checkout; there, git does not track this file.
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
