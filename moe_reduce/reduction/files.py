"""Pruning from file to file: the bytes of kept experts are copied, and no model need fit into memory."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, originals
from moe_reduce.reduction.pool import LOSSLESS_BIAS, check_poolable, foreign_bias, pooled_config
from moe_reduce.reduction.prune import check_kept, smaller_config
from moe_reduce.reduction.selection import Kept
from moe_reduce.storage import hf_config, manifest
from moe_reduce.storage.model_directory import Contents
from moe_reduce.storage.names import LAYER, TABLE, leaves
from moe_reduce.storage.parameter_tensors import check_names, check_weight
from moe_reduce.storage.tensors import Entry, TensorFiles, TensorItem

Source = Entry | Callable[[], np.ndarray]
EXPERT_NAME = f"{LAYER}.mlp.experts.{{expert}}."


@dataclass(frozen=True)
class Directory:
    """A model directory of which only headers have been read."""

    path: Path
    config: ModelConfig
    raw: dict
    files: TensorFiles
    chain: tuple[Step, ...]

    @property
    def moe(self) -> MoEConfig:
        """Raises UserError for a dense model."""
        if self.config.moe is None:
            raise UserError(f"{self.path} is a dense model: it has no experts to prune")
        return self.config.moe


def open_directory(path: Path) -> Directory:
    """Reads config.json, headers and manifest; raises UserError when tensors are missing, unknown or mis-shaped, or
    those of one leaf differ in dtype."""
    config, raw = hf_config.read_config(path)
    files = TensorFiles(path)
    check_names(files, config)
    for name, entry in files.entries.items():
        check_weight(name, entry)
    for leaf in leaves(config):
        dtypes = {str(files.entries[name].dtype) for name in leaf.names()}
        if len(dtypes) > 1:
            raise UserError(f"tensors of {leaf.path} in {path} differ in dtype {sorted(dtypes)}: convert them to one")
    return Directory(path, config, raw, files, manifest.read_chain(path))


def prune_files(directory: Directory, kept: Kept, step: Step) -> Contents:
    """The directory's model with the kept experts only, as `storage.model.write_directory` takes it.

    Layers of a per-layer model that keep different numbers become one pool, with each layer's own experts the only
    ones that it can choose: no config of a per-layer model says otherwise. Raises UserError as `pruning.prune` does.
    """
    config = pruned_config(directory, kept)
    items = _pooled_items if _uneven(directory, kept) else _smaller_items
    table = directory.files.entries[next(name for name in directory.files.entries if "embed_tokens" in name)]
    chain = (*directory.chain, step)
    return Contents(config, items(directory, config, kept), str(table.dtype), directory.path, directory.raw, chain)


def pruned_config(directory: Directory, kept: Kept) -> ModelConfig:
    """The architecture that is left; raises UserError when the model cannot keep these experts."""
    if _uneven(directory, kept):
        check_poolable(directory.config)
        _check_uneven(directory.moe, kept, directory.config.layers)
        return pooled_config(directory.config, sum(map(len, kept)))
    check_kept(directory.moe, kept, directory.config.layers)
    return smaller_config(directory.config, kept)


def _uneven(directory: Directory, kept: Kept) -> bool:
    return directory.moe.placement == "layer" and len({len(row) for row in kept}) > 1


def _check_uneven(moe: MoEConfig, kept: Kept, layers: int) -> None:
    if len(kept) != layers:
        raise UserError(f"kept experts are given for {len(kept)} layers, the model has {layers} pools")
    for row in kept:
        check_kept(moe, (row,) * layers, layers)


def _smaller_items(directory: Directory, config: ModelConfig, kept: Kept) -> Iterator[TensorItem]:
    shared = directory.moe.placement == "shared"
    for leaf in leaves(config):
        name, stored, _ = TABLE[leaf.path]
        letters = re.findall(r"{(\w+)}", name)
        for index in np.ndindex(leaf.stacked):
            place = dict(zip(letters, index, strict=True))
            row = kept[0 if shared or "layer" not in place else place["layer"]]
            if "expert" in place:
                place["expert"] = row[place["expert"]]
            entry = directory.files.entries[name.format(**place)]
            source: Source = entry
            if "E" in stored.split():
                source = _rows(directory.files, name.format(**place), stored.split().index("E"), row)
            yield leaf.name(index), leaf.stored_shape, entry.dtype, source


def _rows(files: TensorFiles, name: str, axis: int, row: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: np.take(files.read(name), np.asarray(row), axis=axis)


def _pooled_items(directory: Directory, config: ModelConfig, kept: Kept) -> Iterator[TensorItem]:
    order = [(layer, index) for layer, row in enumerate(kept) for index in row]
    for leaf in leaves(config):
        for index in np.ndindex(leaf.stacked):
            name = leaf.name(index)
            if leaf.path.startswith("experts/"):
                layer, expert = order[index[0]]
                suffix = name.split(".", 3)[3]
                entry = directory.files.entries[EXPERT_NAME.format(layer=layer, expert=expert) + suffix]
                yield name, leaf.stored_shape, entry.dtype, entry
            elif leaf.path == "router/weight":
                dtype = directory.files.entries[_stored_name("layers/router/weight", 0)].dtype
                yield name, leaf.stored_shape, dtype, _concatenated(directory, kept)
            elif leaf.path == "layers/router_bias":
                yield name, leaf.stored_shape, np.dtype(np.float32), _own_only(directory, kept, index[0])
            else:
                entry = directory.files.entries[name]
                yield name, leaf.stored_shape, entry.dtype, entry


def _stored_name(path: str, layer: int) -> str:
    return TABLE[path][0].format(layer=layer)


def _kept_rows(directory: Directory, path: str, kept: Kept) -> list[np.ndarray]:
    """Of a leaf with one row for each expert, each layer's kept ones."""
    return [directory.files.read(_stored_name(path, layer))[list(row)] for layer, row in enumerate(kept)]


def _concatenated(directory: Directory, kept: Kept) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate(_kept_rows(directory, "layers/router/weight", kept))


def _own_only(directory: Directory, kept: Kept, layer: int) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        own = _kept_rows(directory, "layers/router_bias", kept) if directory.moe.selection_bias else None
        return foreign_bias([len(row) for row in kept], LOSSLESS_BIAS, own)[layer]

    return make


def sole_callers(directory: Directory) -> np.ndarray | None:
    """The only layer that can choose each expert of a pool, [E]; None where layers share experts, or own them.

    So it is behind an uneven pruning and the lossless start, until the bias is annealed.
    """
    if directory.moe.placement == "layer" or not directory.moe.selection_bias:
        return None
    names = [_stored_name("layers/router_bias", layer) for layer in range(directory.config.layers)]
    callable_NE = np.stack([directory.files.read(name).astype(np.float32) for name in names]) > -LOSSLESS_BIAS / 2
    return np.argmax(callable_NE, axis=0) if np.all(np.sum(callable_NE, axis=0) == 1) else None


def kept_originals(directory: Directory, kept: Kept) -> list[list[list[int]]]:
    """What a manifest says about a pruning: the original (layer, index) of the experts kept, in their new order."""
    before = originals(directory.config, directory.chain)
    rows = [[before[row][index] for index in indices] for row, indices in enumerate(kept)]
    return [[pair for row in rows for pair in row]] if _uneven(directory, kept) else rows
