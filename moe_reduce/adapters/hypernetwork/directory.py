"""Hypernetwork directory: config.json, hypernetwork.safetensors and manifest.json; and the adapters that it writes.

config.json states the configuration, the base by hash and shapes, the encoder by hash and width, and the tasks that
trained the hypernetwork. Fixed leaves are not stored: `load` makes them again and compares SkeMA's projections by hash.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_reduce.adapters import adapter_directory, projections
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork.encoders import Encoder, check_texts
from moe_reduce.adapters.hypernetwork.hypernetwork import Hypernetwork, Statistics
from moe_reduce.adapters.leaves import is_projection
from moe_reduce.core import config_dict, outputs, trees
from moe_reduce.core.config import ExecutionConfig, model_from_dict, to_dict
from moe_reduce.core.disk import publish, restored, temporary_beside, write_json
from moe_reduce.core.errors import UserError
from moe_reduce.core.hypernetwork_config import HypernetworkConfig
from moe_reduce.core.json_files import read_object
from moe_reduce.core.provenance import Input
from moe_reduce.models.model import Model
from moe_reduce.storage import manifest
from moe_reduce.storage.tensors import TensorFiles, write_file

CONFIG, WEIGHTS = "config.json", "hypernetwork.safetensors"
KIND = outputs.json_kind("a hypernetwork", CONFIG, ("hypernetwork", "base", "encoder", "tasks"))
PARAMS, MEAN, DEVIATION = "params", "mean", "deviation"


@dataclass(frozen=True, eq=False)
class Trained:
    """A hypernetwork with what it was trained on."""

    hypernetwork: Hypernetwork
    base: Input
    encoder: dict[str, Any]  # name, sha256 and width
    tasks: tuple[str, ...]  # names of the training tasks

    def check_encoder(self, encoder: Encoder) -> None:
        """Raise UserError for another encoder than the one it was trained with."""
        self.check_encoding(encoder_entry(encoder))

    def check_encoding(self, entry: Mapping[str, Any]) -> None:
        """Raise UserError unless `entry` has the width and hash of the embeddings that trained the hypernetwork."""
        hypernetworks.check_width(self.hypernetwork, entry["width"])
        if entry["sha256"] != self.encoder["sha256"]:
            raise UserError(
                f"encoder {entry['name']} has other files than {self.encoder['name']}, with which the hypernetwork was "
                "trained: give that one"
            )

    def check_unseen(self, names: tuple[str, ...]) -> None:
        """Raise UserError for the first task that trained the hypernetwork and is to be measured as unseen."""
        for name in names:
            if name in self.tasks:
                raise UserError(f"task {name} trained this hypernetwork, so it is not unseen: measure another")


def encoder_entry(encoder: Encoder) -> dict[str, Any]:
    """An encoder in config.json."""
    return {"name": encoder.name, "sha256": encoder.hash, "width": encoder.width}


def save(trained: Trained, directory: Path) -> None:
    """Write into an existing, empty directory."""
    hypernetwork = trained.hypernetwork
    trees_by_name: dict[str, Any] = {PARAMS: hypernetwork.params}
    if hypernetwork.statistics is not None:
        trees_by_name |= {MEAN: hypernetwork.statistics.mean, DEVIATION: hypernetwork.statistics.deviation}
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(trees_by_name).items()}
    items = [(path, leaf.shape, leaf.dtype, leaf) for path, leaf in leaves.items()]
    hashes = {WEIGHTS: write_file(directory / WEIGHTS, items)}
    write_json(
        directory / CONFIG,
        {
            "hypernetwork": to_dict(hypernetwork.config),
            "base": {"path": trained.base.path, "sha256": trained.base.sha256, "model": to_dict(hypernetwork.base)},
            "encoder": trained.encoder,
            "tasks": list(trained.tasks),
            "projections": _projections_hash(hypernetwork),
            "parameters": hypernetworks.count(hypernetwork),
        },
    )
    hashes[CONFIG] = manifest.sha256_of_file(directory / CONFIG)
    content = {"versions": manifest.versions(), "commit": manifest.commit(), "files": hashes, "chain": []}
    write_json(directory / manifest.MANIFEST_FILE, content)


def load(directory: Path, base: Input | None = None) -> Trained:
    """Read a hypernetwork directory.

    base: the model that the hypernetwork must belong to; None skips this check. Raises UserError for another base, a
    missing, damaged or changed file, and projections that this machine cannot make again.
    """
    for problem in manifest.verify(restored(directory)):
        raise UserError(f"{problem}: give the directory of a hypernetwork, or fetch it again")
    content = read_object(directory / CONFIG)
    try:
        found = Input(content["base"]["path"], content["base"]["sha256"])
        config = config_dict.build(HypernetworkConfig, content["hypernetwork"], "hypernetwork")
        model = model_from_dict(content["base"]["model"], "base.model")
        encoder, tasks, hashed = content["encoder"], tuple(content["tasks"]), content["projections"]
        width = int(encoder["width"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory / CONFIG} does not describe a hypernetwork ({error!r}): give one that text-to-lora wrote"
        ) from None
    if base is not None and base.sha256 != found.sha256:
        raise UserError(
            f"{directory} is a hypernetwork for {found.path}, and {base.path} is another model (its hash differs): "
            "give the base of this hypernetwork"
        )
    hypernetwork = _with_weights(hypernetworks.abstract(config, model, width), directory)
    if _projections_hash(hypernetwork) != hashed:
        raise UserError(f"projections of {directory} do not have the hash in {CONFIG}: this machine makes others")
    return Trained(hypernetwork, found, encoder, tasks)


def write_adapter(directory: Path, description: str, encoder: Encoder, cache: Path, base: Input | None = None) -> Path:
    """The directory of the adapter for a description: written once below `cache`, then found by hash.

    directory: of the hypernetwork. base: the model that the adapter will run with. Raises UserError for an empty
    description, another encoder, another base, and a damaged hypernetwork.
    """
    (found,) = write_adapters(load(directory, base), [description], encoder, cache)
    return found


def write_adapters(trained: Trained, descriptions: list[str], encoder: Encoder, cache: Path) -> list[Path]:
    """`write_adapter` for several descriptions; all new ones are written by one call of the network."""
    check_texts(descriptions)
    trained.check_encoder(encoder)
    known = _fingerprint(trained)
    targets = {text: cache / hashlib.sha256(f"{known}\n{text}".encode()).hexdigest()[:32] for text in descriptions}
    new = [text for text, target in targets.items() if not (target / adapter_directory.DESCRIPTION).is_file()]
    adapters = hypernetworks.written(trained.hypernetwork, encoder.encode(new)) if new else []
    for text, adapter in zip(new, adapters, strict=True):
        targets[text].parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(targets[text]) as unfinished:
            adapter_directory.save(adapter, trained.hypernetwork.base, trained.base, unfinished)
            write_json(unfinished / "task.json", {"description": text, "hypernetwork": known})
            publish(unfinished, targets[text])
    return [targets[text] for text in descriptions]


def _fingerprint(trained: Trained) -> str:
    """SHA-256 of everything that decides an adapter."""
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(trained.hypernetwork.params).items()}
    statistics = trained.hypernetwork.statistics
    if statistics is not None:
        leaves |= {f"{MEAN}/{path}": np.asarray(leaf) for path, leaf in statistics.mean.items()}
        leaves |= {f"{DEVIATION}/{path}": np.asarray(leaf) for path, leaf in statistics.deviation.items()}
    parts = (projections.digest(leaves), trained.base.sha256, trained.encoder["sha256"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _with_weights(abstract: Hypernetwork, directory: Path) -> Hypernetwork:
    """The hypernetwork with its stored leaves, and its fixed ones made again."""
    files = TensorFiles(directory, WEIGHTS)

    def part(name: str) -> dict[str, Any]:
        found = (path for path in files.entries if path.startswith(f"{name}/"))
        return {path.removeprefix(f"{name}/"): jnp.asarray(files.read(path).copy()) for path in found}

    params, mean, deviation = part(PARAMS), part(MEAN), part(DEVIATION)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(abstract.params).items()}
    for path in sorted(set(shapes) | set(params)):
        if path not in params or path not in shapes or params[path].shape != shapes[path]:
            raise UserError(f"{directory / WEIGHTS}: parameter {path} does not fit {CONFIG}: fetch both again")
    return dataclasses.replace(
        abstract,
        params=trees.unflatten(params),
        fixed=hypernetworks.fixed_leaves(abstract.config, Model(abstract.base, {}, ExecutionConfig())),
        statistics=Statistics(mean, deviation) if mean else None,
    )


def _projections_hash(hypernetwork: Hypernetwork) -> str | None:
    config = hypernetwork.config.adapter
    found = {path: np.asarray(leaf) for path, leaf in hypernetwork.fixed.items() if is_projection(config, path)}
    return projections.digest(found) if found else None
