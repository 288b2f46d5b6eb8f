"""Pruning from file to file: copies the bytes of kept experts, so that the model need not fit into memory."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step, originals
from moe_reduce.core.schemes import Scheme
from moe_reduce.core.stages import PoolStage
from moe_reduce.families import ParameterLayout, parameter_layouts, read_config
from moe_reduce.models.model import Model
from moe_reduce.models.norms import factor
from moe_reduce.models.parameters import ROUTER_BIAS, ffn_norm_scale, only_record
from moe_reduce.reduction.pool import LOSSLESS_BIAS, foreign_bias, home_experts, pool
from moe_reduce.reduction.prune import check_kept, prune
from moe_reduce.reduction.selection import KeptExperts
from moe_reduce.reduction.transform import abstract_model
from moe_reduce.storage import manifest, quantised
from moe_reduce.storage.model_directory import Contents
from moe_reduce.storage.parameter_tensors import check_names, check_weight, left_out, open_tensors, widest
from moe_reduce.storage.tensors import Entry, Source, TensorItem, Tensors
from moe_reduce.storage.weight_parts import Part


@dataclass(frozen=True)
class Directory:
    """A model directory or GGUF file; only its configuration, tensor headers and manifest have been read."""

    path: Path
    config: ModelConfig
    raw: dict
    files: Tensors
    chain: tuple[Step, ...]

    @property
    def quantised(self) -> set[str]:
        """Paths of the quantised parameters."""
        return {path for path, scheme in self.schemes.items() if scheme is not None}

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """Scheme of each parameter by path; None for arrays."""
        return {leaf.path: quantised.scheme_of(leaf, self.files) for leaf in parameter_layouts(self.config)}

    @property
    def moe(self) -> MoEConfig:
        """Configuration of the experts; raises UserError for a dense model."""
        if self.config.moe is None:
            raise UserError(f"{self.path} is a dense model and has no experts: give a mixture of experts")
        return self.config.moe

    def layout(self, component: str, name: str | None = None) -> ParameterLayout:
        """Layout on disk of a component's only parameter, or of the one called `name`."""
        path = only_record(self.config, component, name).path
        return next(leaf for leaf in parameter_layouts(self.config) if leaf.path == path)

    def view(self, leaf: ParameterLayout, index: tuple[int, ...] = ()) -> np.ndarray:
        """View of one tensor on disk, with the axes of the parameter that are not spread over several tensors."""
        return leaf.from_stored(self.files.read(leaf.name(index)))


def open_directory(path: Path) -> Directory:
    """Open a model directory and check its headers.

    Raises UserError when a tensor is missing or unknown, or has a wrong shape or a dtype that weights cannot have.
    """
    config, raw = read_config(path)
    files = open_tensors(path, config)
    check_names(files, config)
    for leaf in parameter_layouts(config):
        for part in quantised.parts_of(leaf, files):
            part.check_dtypes(files)
            for name in () if part.dtypes else part.leaf.names():
                check_weight(name, files.entries[name])
    return Directory(path, config, raw, files, manifest.read_chain(path))


def prune_files(directory: Directory, kept: KeptExperts, step: Step) -> Contents:
    """Return the model with only the kept experts, as input of `model_directory.write_directory`.

    If layers of a per-layer model keep different numbers of experts, which a per-layer configuration cannot express,
    the result is one pool in which each layer can choose only its home experts. step: appended to the chain. Raises
    UserError as `pruned` does.
    """
    config = pruned(directory, kept).config
    uneven = _uneven(directory, kept)
    items = _pooled_items(directory, config, kept) if uneven else _smaller_items(directory, config, kept)
    carried = () if uneven else _carried_items(directory)
    # config.json states the dtype of the first parameter that is not quantised, which is usually the embedding
    first = next(leaf for leaf in parameter_layouts(directory.config) if leaf.path not in directory.quantised)
    dtype = str(directory.files.entries[first.names()[0]].dtype)
    chain = (*directory.chain, step)
    schemes = {leaf.path: directory.schemes[_source(directory, leaf).path] for leaf in parameter_layouts(config)
               if leaf.path != ROUTER_BIAS}  # fmt: skip
    stated = quantised.restated(directory.files, schemes)
    items = itertools.chain(items, carried)
    return Contents(config, items, dtype, directory.path, directory.raw, chain, stated)


def pruned(directory: Directory, kept: KeptExperts) -> Model:
    """Return the pruned model with abstract leaves; raises UserError when the model cannot keep these experts."""
    model = abstract_model(directory.config, chain=directory.chain)
    if not _uneven(directory, kept):
        return prune(model, kept)
    if directory.layout("router").path in directory.quantised:
        raise UserError(f"the routers of {directory.path} are quantised and cannot be joined: prune with --scope=layer")
    if quantised.names_modules(directory.files):
        raise UserError(f"{directory.path} is quantised by names that a pool lacks: prune with --scope=layer")
    pooled = pool(model, PoolStage(canonical=False))
    for row in kept:
        check_kept(directory.config, (row,) * len(kept))  # each layer by itself
    offsets = np.arange(len(kept)) * directory.moe.experts
    return prune(
        pooled, (tuple(int(start) + index for start, row in zip(offsets, kept, strict=True) for index in row),)
    )


def _uneven(directory: Directory, kept: KeptExperts) -> bool:
    return directory.moe.placement == "layer" and len({len(row) for row in kept}) > 1


def _layouts(directory: Directory) -> dict[str, ParameterLayout]:
    return {leaf.path: leaf for leaf in parameter_layouts(directory.config)}


def _smaller_items(directory: Directory, config: ModelConfig, kept: KeptExperts) -> Iterator[TensorItem]:
    """Tensors of a model that keeps equally many experts in each row."""
    by_layer, written = len(kept) > 1, set()
    for before, part in _parts(directory, config):
        leaf = part.leaf
        axis, numbered = leaf.record.expert_axis, len(leaf.stacked)
        for index in np.ndindex(leaf.stacked):
            old, source, row = list(index), None, ()
            if axis is not None:
                row = kept[index[0] if by_layer else 0]
            if axis is not None and axis < numbered:  # each expert has a tensor of its own, which is copied whole
                old[axis] = row[index[axis]]
            name, files = before.leaf.name(tuple(old)), directory.files
            if axis is not None and axis >= numbered:
                source = _slices(files, (before, part), name, axis - numbered, row)
            if leaf.name(index) not in written:  # several parameters may share a tensor
                yield leaf.name(index), part.stored_shape, files.entries[name].dtype, source or files.source(name)
            written.add(leaf.name(index))


def _carried_items(directory: Directory) -> Iterator[TensorItem]:
    """Tensors of parts that nothing computes, as they are."""
    for name in left_out(directory.files, directory.config):
        entry = directory.files.entries[name]
        yield name, entry.shape, entry.dtype, directory.files.source(name)


def _parts(directory: Directory, config: ModelConfig) -> Iterator[tuple[Part, Part]]:
    """Each array of a parameter, before and after; a quantised one is several arrays."""
    before = _layouts(directory)
    for leaf in parameter_layouts(config):
        old, files = before[leaf.path], directory.files
        scheme = quantised.scheme_of(old, files)
        if scheme is not None and not old.record.per_expert and old.record.expert_axis is not None:
            _check_router(old, scheme)
        yield from zip(quantised.parts_of(old, files), quantised.like(files, old, leaf), strict=True)


def _check_router(leaf: ParameterLayout, scheme: Scheme) -> None:
    """Raise UserError where the columns of a router share scales."""
    if scheme.shares_outputs or scheme.code == "nf4":
        raise UserError(f"{leaf.path} is quantised, and its experts share a scale: prune, then quantise")


def _slices(files: Tensors, parts: tuple[Part, Part], name: str, axis: int, row: tuple[int, ...]) -> Source:
    """Kept slices of a tensor of all experts; where these lie whole on disk, they are copied without being read."""
    (before, after), whole = parts, files.source(name)
    if isinstance(whole, Entry) and before.is_by_expert and before.leaf.stored_axes == after.leaf.stored_axes:
        return whole.rows(row)
    if before.leaf.parts > 1:
        return partial(_taken_of_all, files.read, before.leaf, name, row)
    return partial(_taken, files.read, parts, name, axis, row)


def _taken(
    read: Callable[[str], np.ndarray], parts: tuple[Part, Part], name: str, axis: int, row: tuple[int, ...]
) -> np.ndarray:
    """Kept slices of one tensor, converted from the old layout to the new one."""
    before, after = parts
    return after.to_disk([(after.leaf, np.take(before.from_disk(read(name)), np.asarray(row), axis=axis))])


def _taken_of_all(
    read: Callable[[str], np.ndarray], leaf: ParameterLayout, name: str, row: tuple[int, ...]
) -> np.ndarray:
    """Kept slices of a tensor that several parameters share, for all of them."""
    assert leaf.stored_expert_axis is not None, leaf.path
    return np.take(read(name), np.asarray(row), axis=leaf.stored_expert_axis)


def _one_expert(read: Callable[[str], np.ndarray], parts: tuple[Part, Part], name: str, expert: int) -> np.ndarray:
    """One expert's slice of a tensor that holds all experts of a layer, converted to the new layout."""
    before, after = parts
    return after.to_disk([(after.leaf, np.asarray(before.from_disk(read(name))[expert]))])


def _source(directory: Directory, leaf: ParameterLayout) -> ParameterLayout:
    """Layout of the parameter whose values a pruned model's parameter holds."""
    if leaf.record.component in ("experts", "router"):
        return directory.layout(leaf.record.component, leaf.record.name)
    return _layouts(directory)[leaf.path]


def _pooled_items(directory: Directory, config: ModelConfig, kept: KeptExperts) -> Iterator[TensorItem]:
    """Tensors of the pool made from layers that keep different numbers of experts."""
    origins = [(layer, index) for layer, row in enumerate(kept) for index in row]
    for leaf in parameter_layouts(config):
        component = leaf.record.component
        if component in ("router", "router_bias"):
            for index in np.ndindex(leaf.stacked):
                if component == "router":
                    old = directory.layout("router", leaf.record.name)
                    dtype, make = _widest(directory, old), partial(_router, directory, (old, leaf), kept)
                else:
                    dtype, make = np.dtype(np.float32), partial(_bias, directory, kept, index[0])
                yield leaf.name(index), leaf.stored_shape, dtype, make
            continue
        old, files = _source(directory, leaf), directory.files
        for source, target in zip(quantised.parts_of(old, files), quantised.like(files, old, leaf), strict=True):
            for index in np.ndindex(target.leaf.stacked):
                place = origins[index[0]] if component == "experts" else index
                name = source.leaf.name(place[: len(source.leaf.stacked)])
                data = files.source(name)
                if len(source.leaf.stacked) < len(place):
                    data = partial(_one_expert, files.read, (source, target), name, place[1])
                yield target.leaf.name(index), target.stored_shape, files.entries[name].dtype, data


def _router(directory: Directory, layouts: tuple[ParameterLayout, ParameterLayout], kept: KeptExperts) -> np.ndarray:
    """Kept columns of the routers of all layers, or of their biases, side by side. layouts: before and after."""
    before, after = layouts
    columns = [directory.view(before, (layer,))[..., list(row)] for layer, row in enumerate(kept)]
    dtype = _widest(directory, before)
    return after.to_stored(np.concatenate([column.astype(dtype) for column in columns], axis=-1))


def _widest(directory: Directory, leaf: ParameterLayout) -> np.dtype:
    """Dtype that holds the values of a parameter in all layers."""
    return widest({directory.files.entries[name].dtype for name in leaf.names()})


def _bias(directory: Directory, kept: KeptExperts, layer: int) -> np.ndarray:
    """Selection bias that restricts one layer to its home experts, fp32 [E]; E: all experts kept."""
    sizes = [len(row) for row in kept]
    bias_E = foreign_bias(sizes, LOSSLESS_BIAS)[layer]
    if directory.moe.selection_bias:
        before = directory.view(directory.layout("router_bias"), (layer,))[list(kept[layer])]
        bias_E[home_experts(sizes)[layer]] = before.astype(np.float32)
    return bias_E


def exclusive_layers(directory: Directory) -> np.ndarray | None:
    """Return, for each expert of a pool, the only layer whose bias lets it choose that expert, [E].

    None if some expert is open to several layers or to none, and for a model without a pool. Experts have exclusive
    layers after an uneven pruning or a lossless start, until the bias is annealed. A smaller bias suffices if it is
    still too large for any input to make a layer choose another layer's expert.
    """
    if directory.moe.placement == "layer" or not directory.moe.selection_bias:
        return None
    bias = directory.layout("router_bias")
    layers = range(directory.config.expert_layers)
    bias_NE = np.stack([directory.view(bias, (layer,)).astype(np.float32) for layer in layers])
    # scores are from 0 to 1
    reach_NE = np.float32(1) if directory.moe.bias_on == "scores_of_choice" else _largest_logits(directory)
    # a layer never chooses an expert whose largest biased logit is below the smallest ones of A others
    least_N1 = np.sort(bias_NE - reach_NE, axis=1)[:, -directory.moe.active, None]
    selectable_NE = (bias_NE > -LOSSLESS_BIAS / 2) & (bias_NE + reach_NE >= least_N1)
    return np.argmax(selectable_NE, axis=0) if np.all(np.sum(selectable_NE, axis=0) == 1) else None


def _largest_logits(directory: Directory) -> np.ndarray:
    """Upper bound of the magnitude of router logits, fp32 [N, E]: ‖scale·w‖₂·√D, since inputs have an RMS of 1.

    A bias of the logits adds its magnitude.
    """
    config, router = directory.config, directory.layout("router")
    scale = _layouts(directory)[ffn_norm_scale(config).path]
    found = []
    for layer in range(config.expert_layers):
        w_DE = directory.view(router, (layer,) if router.stacked else ()).astype(np.float32)
        scale_D = factor(config, directory.view(scale, (layer,)).astype(np.float32))
        largest_E = np.linalg.norm(w_DE * scale_D[:, None], axis=0) * np.sqrt(np.float32(config.width))
        if directory.moe.biases:
            bias = directory.layout("router", "bias")
            largest_E += np.abs(directory.view(bias, (layer,) if bias.stacked else ()).astype(np.float32))
        found.append(largest_E)
    return np.stack(found)


def kept_originals(directory: Directory, kept: KeptExperts) -> list[list[list[int]]]:
    """Original (layer, index) of the experts kept, by row and in their new order, as a manifest records them."""
    before = originals(directory.config, directory.chain)
    rows = [[before[row][index] for index in indices] for row, indices in enumerate(kept)]
    return [[pair for row in rows for pair in row]] if _uneven(directory, kept) else rows
