"""Adapter directory: adapter.safetensors, adapter.json, and PEFT's two files if PEFT can represent the adapter.

By default SkeMA's projections are not stored: `load` makes them again from method and seed, and compares their hash
with the one in adapter.json. adapter.json also holds the hashes of the base and of each file; `load` refuses any
difference.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import peft_reading, peft_writing, projections
from moe_reduce.adapters.adapter import Adapter, check_fits, count
from moe_reduce.adapters.checks import check
from moe_reduce.adapters.leaves import is_projection, leaves_of
from moe_reduce.adapters.merging import digest
from moe_reduce.adapters.peft_modules import CONFIG_FILE, WEIGHTS_FILE
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core import json_files, outputs, trees
from moe_reduce.core.config import AdapterConfig, ModelConfig, to_dict
from moe_reduce.core.config_dict import build, completed
from moe_reduce.core.disk import restored, write_json
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.storage import manifest
from moe_reduce.storage.tensors import TensorFiles, write_file

DESCRIPTION = "adapter.json"
WEIGHTS = "adapter.safetensors"
KIND = outputs.json_kind("an adapter", DESCRIPTION, ("base", "config", "digest", "files"))


def save(adapter: Adapter, model: ModelConfig, base: Input, directory: Path) -> None:
    """Write the adapter into an existing, empty directory. base: the model directory that the adapter belongs to."""
    if adapter.replaced:
        raise UserError("an adapter that replaces whole parameters has no format but PEFT's: keep its own files")
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(adapter.tree).items()}
    projected = _projection_paths(adapter.config, leaves)
    left_out = set() if _stores_projections(adapter.config) else projected
    items = [(path, leaf.shape, leaf.dtype, leaf) for path, leaf in leaves.items() if path not in left_out]
    files = {WEIGHTS: write_file(directory / WEIGHTS, items)}
    if peft_writing.representable(adapter, model):
        peft_writing.write(adapter, model, directory, base.path)
        files |= {name: manifest.sha256_of_file(directory / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    write_json(
        directory / DESCRIPTION,
        {
            "config": to_dict(adapter.config),
            "digest": digest(adapter),
            "base": {"path": base.path, "sha256": base.sha256},
            "trained_parameters": count(adapter),
            "projections": {
                "sha256": projections.digest({path: leaves[path] for path in projected}) if projected else None,
                "stored": not left_out,
            },
            "files": files,
            "versions": manifest.versions(),
            "commit": manifest.commit(),
        },
    )


def load(directory: Path, model: ModelConfig, base: Input | None) -> Adapter:
    """Load an adapter from our directory or PEFT's.

    base: the model that the adapter must belong to; None skips this check. PEFT's files name no hash, so they are not
    checked. Raises UserError for another base, for a file with another hash than in adapter.json, and for projections
    that cannot be reproduced.
    """
    if not (restored(directory) / DESCRIPTION).is_file():
        return peft_reading.read(directory, model)
    content = described(directory)
    if base is not None and content["base"]["sha256"] != base.sha256:
        raise UserError(
            f"{directory} is an adapter of {content['base']['path']}, and {base.path} is another model (its hash "
            "differs): give the base of this adapter"
        )
    config = build(AdapterConfig, completed(AdapterConfig, content["config"]), "config")
    check(config, model)
    files = TensorFiles(directory, WEIGHTS)
    leaves = _remade_projections(config, model) | {name: files.read(name).copy() for name in files.entries}
    _check_projections(directory, content, config, leaves)
    adapter = Adapter(config, trees.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}))
    check_fits(adapter, model)
    if digest(adapter) != content["digest"]:
        raise UserError(f"{directory / DESCRIPTION} does not describe the adapter in {WEIGHTS}: fetch both again")
    return adapter


def described(directory: Path) -> dict[str, Any]:
    """Content of adapter.json. Raises UserError if it is damaged, or if a file that it lists is missing or changed."""
    file = directory / DESCRIPTION
    content = json_files.read_object(file)
    try:
        names = dict(content["files"])
        _ = content["config"], content["digest"], content["base"]["sha256"], content["projections"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not what adapt writes ({error!r}): fetch it again") from None
    for name, expected in names.items():
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing: fetch it again")
        if manifest.sha256_of_file(directory / name) != expected:
            raise UserError(f"{directory / name} has changed: its SHA-256 is not the one in {DESCRIPTION}")
    return content


def _check_projections(directory: Path, content: Any, config: AdapterConfig, leaves: dict[str, Any]) -> None:
    """Raise UserError if the projections are not those that the adapter was trained with."""
    projected = _projection_paths(config, leaves)
    if projected and projections.digest({path: leaves[path] for path in projected}) != content["projections"]["sha256"]:
        raise UserError(
            f"projections of {directory} do not have the hash in {DESCRIPTION}: they were changed, or this machine "
            "makes others from the same seed (train with adapter.stored_projections=True)"
        )


def _stores_projections(config: AdapterConfig) -> bool:
    return config.stored_projections or config.trainable_sketch


def _projection_paths(config: AdapterConfig, leaves: dict[str, Any]) -> set[str]:
    """Paths of SkeMA's projections among an adapter's leaves."""
    return {path for path in leaves if is_projection(config, path)}


def _remade_projections(config: AdapterConfig, model: ModelConfig) -> dict[str, np.ndarray]:
    """Projections made from the seed, by path; {} if the directory stores them or the method has none."""
    if _stores_projections(config):
        return {}
    return {
        f"{target.path}/{name}": np.asarray(leaf.init(target, None))
        for target in targets_of(config, model)
        for name, leaf in leaves_of(config, target).items()
        if is_projection(config, name)
    }
