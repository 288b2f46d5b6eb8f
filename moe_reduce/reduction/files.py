"""Pruning from file to file: copies the bytes of kept experts, so that the model need not fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, originals
from moe_reduce.core.stages import PoolStage
from moe_reduce.families import Leaf, leaves, read_config
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import by_path, only_record, select
from moe_reduce.reduction.pool import LOSSLESS_BIAS, foreign_bias, home_experts, pool
from moe_reduce.reduction.prune import check_kept, prune
from moe_reduce.reduction.selection import KeptExperts
from moe_reduce.reduction.transform import abstract_model
from moe_reduce.storage import manifest
from moe_reduce.storage.model_directory import Contents
from moe_reduce.storage.parameter_tensors import check_names, check_weight
from moe_reduce.storage.tensors import Entry, TensorFiles, TensorItem

Source = Entry | Callable[[], np.ndarray]


@dataclass(frozen=True)
class Directory:
    """A model directory; only its configuration, tensor headers and manifest have been read."""

    path: Path
    config: ModelConfig
    raw: dict
    files: TensorFiles
    chain: tuple[Step, ...]

    @property
    def moe(self) -> MoEConfig:
        """Configuration of the experts; raises UserError for a dense model."""
        if self.config.moe is None:
            raise UserError(f"{self.path} is a dense model and has no experts: give a mixture of experts")
        return self.config.moe

    def layout(self, component: str, name: str | None = None) -> Leaf:
        """Layout on disk of a component's only parameter, or of the one called `name`."""
        path = only_record(self.config, component, name).path
        return next(leaf for leaf in leaves(self.config) if leaf.path == path)

    def view(self, leaf: Leaf, index: tuple[int, ...] = ()) -> np.ndarray:
        """View of one tensor on disk; its axes are those that follow the parameter's stacked axes."""
        return leaf.from_stored(self.files.read(leaf.name(index)))


def open_directory(path: Path) -> Directory:
    """Open a model directory and check its headers.

    Raises UserError when a tensor is missing, unknown or of the wrong shape, or when the tensors of one parameter
    differ in dtype.
    """
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


def prune_files(directory: Directory, kept: KeptExperts, step: Step) -> Contents:
    """Return the model with only the kept experts, as input of `model_directory.write_directory`.

    If layers of a per-layer model keep different numbers of experts, which a per-layer configuration cannot express,
    the result is one pool in which each layer can choose only its home experts. step: appended to the chain. Raises
    UserError as `pruned` does.
    """
    config = pruned(directory, kept).config
    items = _pooled_items if _uneven(directory, kept) else _smaller_items
    embedding = _layouts(directory)[select(directory.config, component="embedding")[0].path]
    dtype = str(directory.files.entries[embedding.name(())].dtype)
    chain = (*directory.chain, step)
    return Contents(config, items(directory, config, kept), dtype, directory.path, directory.raw, chain)


def pruned(directory: Directory, kept: KeptExperts) -> Model:
    """Return the pruned model with abstract leaves; raises UserError when the model cannot keep these experts."""
    model = abstract_model(directory.config, chain=directory.chain)
    if not _uneven(directory, kept):
        return prune(model, kept)
    pooled = pool(model, PoolStage(canonical=False))
    for row in kept:
        check_kept(directory.config, (row,) * len(kept))  # each layer by itself
    offsets = np.arange(len(kept)) * directory.moe.experts
    return prune(
        pooled, (tuple(int(start) + index for start, row in zip(offsets, kept, strict=True) for index in row),)
    )


def _uneven(directory: Directory, kept: KeptExperts) -> bool:
    return directory.moe.placement == "layer" and len({len(row) for row in kept}) > 1


def _layouts(directory: Directory) -> dict[str, Leaf]:
    return {leaf.path: leaf for leaf in leaves(directory.config)}


def _smaller_items(directory: Directory, config: ModelConfig, kept: KeptExperts) -> Iterator[TensorItem]:
    """Tensors of a model that keeps equally many experts in each row."""
    before, records, by_layer = _layouts(directory), by_path(config), len(kept) > 1
    for leaf in leaves(config):
        axis, numbered = records[leaf.path].expert_axis, len(leaf.stacked)
        for index in np.ndindex(leaf.stacked):
            row = kept[index[0] if by_layer and index else 0]
            old, source = list(index), None
            if axis is not None and axis < numbered:  # each expert has a tensor of its own, which is copied whole
                old[axis] = row[index[axis]]
            entry = directory.files.entries[before[leaf.path].name(tuple(old))]
            if axis is not None and axis >= numbered:
                source = partial(_taken, directory, (before[leaf.path], leaf), index, axis - numbered, row)
            yield leaf.name(index), leaf.stored_shape, entry.dtype, source or entry


def _taken(
    directory: Directory, layouts: tuple[Leaf, Leaf], index: tuple[int, ...], axis: int, row: tuple[int, ...]
) -> np.ndarray:
    """Kept slices of one tensor, converted from the old layout to the new one."""
    before, after = layouts
    return after.to_stored(np.take(directory.view(before, index), np.asarray(row), axis=axis))


def _pooled_items(directory: Directory, config: ModelConfig, kept: KeptExperts) -> Iterator[TensorItem]:
    """Tensors of the pool made from layers that keep different numbers of experts."""
    origins = [(layer, index) for layer, row in enumerate(kept) for index in row]
    before, records = _layouts(directory), by_path(config)
    for leaf in leaves(config):
        record = records[leaf.path]
        for index in np.ndindex(leaf.stacked):
            name = leaf.name(index)
            if record.component == "experts":
                layout = directory.layout("experts", record.name)
                entry = directory.files.entries[layout.name(origins[index[0]])]
                yield name, leaf.stored_shape, entry.dtype, entry
            elif record.component == "router":
                dtype = directory.files.entries[directory.layout("router").name((0,))].dtype
                yield name, leaf.stored_shape, dtype, partial(_router, directory, leaf, kept)
            elif record.component == "router_bias":
                yield name, leaf.stored_shape, np.dtype(np.float32), partial(_bias, directory, kept, index[0])
            else:
                entry = directory.files.entries[before[leaf.path].name(index)]
                yield name, leaf.stored_shape, entry.dtype, entry


def _router(directory: Directory, leaf: Leaf, kept: KeptExperts) -> np.ndarray:
    """Kept columns of the routers of all layers, side by side."""
    router = directory.layout("router")
    columns = [directory.view(router, (layer,))[:, list(row)] for layer, row in enumerate(kept)]
    return leaf.to_stored(np.concatenate(columns, axis=1))


def _bias(directory: Directory, kept: KeptExperts, layer: int) -> np.ndarray:
    """Selection bias that restricts one layer to its home experts, fp32 [P]."""
    sizes = [len(row) for row in kept]
    bias_P = foreign_bias(sizes, LOSSLESS_BIAS)[layer]
    if directory.moe.selection_bias:
        bias_E = directory.view(directory.layout("router_bias"), (layer,))[list(kept[layer])]
        bias_P[home_experts(sizes)[layer]] = bias_E.astype(np.float32)
    return bias_P


def exclusive_layers(directory: Directory) -> np.ndarray | None:
    """Return, for each expert of a pool, the only layer whose bias lets it choose that expert, [E].

    None if some expert is open to several layers or to none, and for a model without a pool. Experts have exclusive
    layers after an uneven pruning or a lossless start, until the bias is annealed.
    """
    if directory.moe.placement == "layer" or not directory.moe.selection_bias:
        return None
    bias = directory.layout("router_bias")
    rows = [directory.view(bias, (layer,)).astype(np.float32) for layer in range(directory.config.layers)]
    selectable_NE = np.stack(rows) > -LOSSLESS_BIAS / 2
    return np.argmax(selectable_NE, axis=0) if np.all(np.sum(selectable_NE, axis=0) == 1) else None


def kept_originals(directory: Directory, kept: KeptExperts) -> list[list[list[int]]]:
    """Original (layer, index) of the experts kept, by row and in their new order, as a manifest records them."""
    before = originals(directory.config, directory.chain)
    rows = [[before[row][index] for index in indices] for row, indices in enumerate(kept)]
    return [[pair for row in rows for pair in row]] if _uneven(directory, kept) else rows
