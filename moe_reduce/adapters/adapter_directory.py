"""An adapter's own directory: adapter.safetensors, adapter.json, and beside them PEFT's two files where it has words.

Projections of SkeMA are made again from seed and method and must have the hash that adapter.json gives, unless they are
stored. adapter.json names the base by its hash, and each file by its SHA-256; nothing that differs is used.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import peft, projections
from moe_reduce.adapters.adapter import Adapter, check, check_fits, count, projected
from moe_reduce.adapters.merging import digest
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ModelConfig, to_dict
from moe_reduce.core.config_dict import build
from moe_reduce.core.disk import write_json
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.storage import manifest
from moe_reduce.storage.tensors import TensorFiles, write_file

DESCRIPTION = "adapter.json"
WEIGHTS = "adapter.safetensors"


def save(adapter: Adapter, model: ModelConfig, base: Input, directory: Path) -> None:
    """Writes the directory, which is there and empty. base: the model directory that the adapter belongs to."""
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(adapter.tree).items()}
    fixed = _projections(adapter.config, model)
    remade = set() if _stores(adapter.config) else set(fixed)
    items = [(path, leaf.shape, leaf.dtype, leaf) for path, leaf in leaves.items() if path not in remade]
    files = {WEIGHTS: write_file(directory / WEIGHTS, items)}
    if peft.can_say(adapter, model):
        peft.write(adapter, model, directory, base.path)
        files |= {name: manifest.sha256_of_file(directory / name) for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE)}
    write_json(
        directory / DESCRIPTION,
        {
            "config": to_dict(adapter.config),
            "digest": digest(adapter),
            "base": {"path": base.path, "sha256": base.sha256},
            "trained_parameters": count(adapter),
            "projections": {
                "sha256": projections.digest({path: leaves[path] for path in fixed}) if fixed else None,
                "stored": not remade,
            },
            "files": files,
            "versions": manifest.versions(),
            "commit": manifest.commit(),
        },
    )


def load(directory: Path, model: ModelConfig, base: Input | None) -> Adapter:
    """The adapter in a directory of ours or of PEFT.

    base: what the adapter must belong to; None does not ask, and a directory of PEFT cannot tell. Raises UserError when
    a file is not the one that adapter.json describes, when projections come out differently, or for another base.
    """
    if not (directory / DESCRIPTION).is_file():
        return peft.read(directory, model)
    content = described(directory)
    if base is not None and content["base"]["sha256"] != base.sha256:
        raise UserError(
            f"{directory} is an adapter of {content['base']['path']}, and {base.path} is another model (its hash "
            "differs): give its own base"
        )
    config = build(AdapterConfig, content["config"], "config")
    check(config, model)
    files = TensorFiles(directory, WEIGHTS)
    leaves = {name: files.read(name).copy() for name in files.entries}
    leaves |= _checked(directory, content, config, model, leaves)
    adapter = Adapter(config, trees.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()}))
    check_fits(adapter, model)
    if digest(adapter) != content["digest"]:
        raise UserError(f"{directory / DESCRIPTION} describes another adapter than {WEIGHTS} holds: fetch both again")
    return adapter


def described(directory: Path) -> dict[str, Any]:
    """The content of adapter.json; raises UserError when it, or a file that it describes, is not what was written."""
    file = directory / DESCRIPTION
    try:
        content = json.loads(file.read_text())
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


def _checked(
    directory: Path, content: dict[str, Any], config: AdapterConfig, model: ModelConfig, leaves: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Projections, stored or made again, if they are those that the adapter was trained with."""
    remade = _projections(config, model)
    if not remade:
        return {}
    found = remade | {path: leaf for path, leaf in leaves.items() if path in remade}
    if projections.digest(found) != content["projections"]["sha256"]:
        raise UserError(
            f"projections of {directory} do not have the hash in {DESCRIPTION}: they were changed, or this machine "
            "makes others from the same seed (train with adapter.stored_projections=True)"
        )
    return found


def _stores(config: AdapterConfig) -> bool:
    return config.stored_projections or config.trainable_sketch


def _projections(config: AdapterConfig, model: ModelConfig) -> dict[str, np.ndarray]:
    """By path below the adapter, shaped as there."""
    if config.method != "skema":
        return {}
    found = {}
    for target in targets_of(config, model):
        for name, leaf in projected(config, target).items():
            found[f"{target.path}/{name}"] = leaf if target.layers is not None else leaf[0]
    return found
