"""Pruning from file to file: the bytes of kept experts are copied, and no model need fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, originals
from moe_reduce.families import Leaf, by_path, leaves, read_config
from moe_reduce.reduction.pool import LOSSLESS_BIAS, check_poolable, foreign_bias, pooled_config
from moe_reduce.reduction.prune import check_kept, smaller_config
from moe_reduce.reduction.selection import Kept
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import Contents
from moe_reduce.storage.parameter_tensors import check_names, check_weight
from moe_reduce.storage.tensors import Entry, TensorFiles, TensorItem

Source = Entry | Callable[[], np.ndarray]


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
    config, raw = read_config(path)
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
    embedding = next(leaf for leaf in leaves(directory.config) if leaf.record.component == "embedding")
    dtype = str(directory.files.entries[embedding.name()].dtype)
    chain = (*directory.chain, step)
    return Contents(config, items(directory, config, kept), dtype, directory.path, directory.raw, chain)


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
        before = by_path(directory.config)[leaf.path]
        for index in np.ndindex(leaf.stacked):
            place = dict(zip(leaf.numbered, index, strict=True))
            row = kept[0 if shared or "N" not in place else place["N"]]
            if "E" in place:
                place["E"] = row[place["E"]]
            name = before.name([place[letter] for letter in before.numbered])
            entry = directory.files.entries[name]
            source: Source = entry
            if "E" in before.stored_axes:
                source = _rows(directory.files, name, before.stored_axes.index("E"), row)
            yield leaf.name(index), leaf.stored_shape, entry.dtype, source


def _rows(files: TensorFiles, name: str, axis: int, row: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: np.take(files.read(name), np.asarray(row), axis=axis)


def _pooled_items(directory: Directory, config: ModelConfig, kept: Kept) -> Iterator[TensorItem]:
    order = [(layer, index) for layer, row in enumerate(kept) for index in row]
    before = by_path(directory.config)
    for leaf in leaves(config):
        for index in np.ndindex(leaf.stacked):
            name = leaf.name(index)
            if leaf.path == "router/weight":
                dtype = directory.files.entries[_router(directory).name((0,))].dtype
                yield name, leaf.stored_shape, dtype, _concatenated(directory, kept)
            elif leaf.path == "layers/router_bias":
                yield name, leaf.stored_shape, np.dtype(np.float32), _own_only(directory, kept, index[0])
            else:
                of_layer = leaf.path.startswith("experts/")  # in the pool now, and in a layer before
                source = (
                    before[f"layers/{leaf.path}"].name(order[index[0]]) if of_layer else before[leaf.path].name(index)
                )
                entry = directory.files.entries[source]
                yield name, leaf.stored_shape, entry.dtype, entry


def _router(directory: Directory) -> Leaf:
    return by_path(directory.config)["layers/router/weight"]


def _kept_rows(directory: Directory, leaf: Leaf, kept: Kept) -> list[np.ndarray]:
    """Rows of each layer's kept experts, of a leaf that stores one row for each expert."""
    assert leaf.stored_axes[0] == "E", leaf.path
    return [directory.files.read(leaf.name((layer,)))[list(row)] for layer, row in enumerate(kept)]


def _concatenated(directory: Directory, kept: Kept) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate(_kept_rows(directory, _router(directory), kept))


def _own_only(directory: Directory, kept: Kept, layer: int) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        bias = by_path(directory.config).get("layers/router_bias")
        own = None if bias is None else _kept_rows(directory, bias, kept)
        return foreign_bias([len(row) for row in kept], LOSSLESS_BIAS, own)[layer]

    return make


def sole_callers(directory: Directory) -> np.ndarray | None:
    """The only layer that can choose each expert of a pool, [E]; None where layers share experts, or own them.

    So it is behind an uneven pruning and the lossless start, until the bias is annealed.
    """
    if directory.moe.placement == "layer" or not directory.moe.selection_bias:
        return None
    names = by_path(directory.config)["layers/router_bias"].names()
    callable_NE = np.stack([directory.files.read(name).astype(np.float32) for name in names]) > -LOSSLESS_BIAS / 2
    return np.argmax(callable_NE, axis=0) if np.all(np.sum(callable_NE, axis=0) == 1) else None


def kept_originals(directory: Directory, kept: Kept) -> list[list[list[int]]]:
    """What a manifest says about a pruning: the original (layer, index) of the experts kept, in their new order."""
    before = originals(directory.config, directory.chain)
    rows = [[before[row][index] for index in indices] for row, indices in enumerate(kept)]
    return [[pair for row in rows for pair in row]] if _uneven(directory, kept) else rows
