"""Quantisation with calibration text, layer by layer: GPTQ, AWQ, or rounding to nearest.

A layer is quantised with the inputs that it gets from the quantised layers before it, and one layer at a time is in
memory twice. The experts of a pool, which all layers read, follow the last layer.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.schemes import Scheme
from moe_reduce.models.decoder import STACK, Block, Shared
from moe_reduce.models.embedding import Embedding
from moe_reduce.models.model import Model
from moe_reduce.models.moe.experts import ExpertPool, Router
from moe_reduce.models.parameters import Parameter, only_record, parameters
from moe_reduce.models.weights import dequantised
from moe_reduce.models.weights.quantised import as_matrix
from moe_reduce.models.weights.scales import Ranges, extremes
from moe_reduce.quantization import awq
from moe_reduce.quantization.folds import Fold, Leaves, between, folds
from moe_reduce.quantization.moments import (
    Moments,
    RoutedRows,
    expert_moments,
    hidden_rows,
    layer_moments,
    positions,
    source_of,
)
from moe_reduce.quantization.rounding import CalibratedMatrix, Values, gptq_rounded, nearest_rounded
from moe_reduce.reduction.layerwise import attend

MINIMUM_ROWS = 64  # tokens of an expert below which its matrices are rounded to nearest


@dataclass(frozen=True)
class Settings:
    """Choice of method and of the scheme of each matrix by path; a matrix without one stays as it is."""

    method: Literal["rtn", "gptq", "awq"]
    schemes: Mapping[str, Scheme]
    ranges: Ranges = extremes
    minimum_rows: int = MINIMUM_ROWS


@dataclass
class CalibrationReport:
    """Squared change of the products over calibration and their squared size, by component; and rare experts."""

    changed: dict[str, float] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    rare: list[tuple[int, int, int]] = field(default_factory=list)  # (layer, expert, tokens); layer 0 for a pool

    def add(self, component: str, rounded: CalibratedMatrix) -> None:
        """Count the error of one matrix."""
        self.changed[component] = self.changed.get(component, 0.0) + float(rounded.changed)
        self.size[component] = self.size.get(component, 0.0) + float(rounded.size)

    @property
    def squares(self) -> dict[str, tuple[float, float]]:
        """Squared change and squared size of the products, by component."""
        return {name: (self.changed[name], self.size[name]) for name in self.changed}

    def errors(self) -> dict[str, float]:
        """Squared error of the products of each component, relative to their squared size."""
        return {name: self.changed[name] / max(self.size[name], 1e-30) for name in self.changed}


@dataclass
class Text:
    """Calibration text on its way through the layers."""

    states: list[jax.Array]  # residual stream before the present layer, [B, T, D] of each batch
    weights: list[jax.Array]  # [B, T] of each batch; tokens of weight 0 do not count


def quantise(model: Model, batches: Iterable[Mapping[str, Any]], settings: Settings) -> tuple[Model, CalibrationReport]:
    """Quantise the matrices of a model in memory; return it with the errors.

    Raises UserError without a batch.
    """
    pending = Calibration(model.config, model.execution, settings)
    flat = trees.flatten(model.params)
    stacked = {record.path for record in parameters(model.config) if record.stacked}
    rest = pending.before({path: leaf for path, leaf in flat.items() if path not in stacked})
    text = pending.begin(rest, batches)
    layers = []
    for number in tqdm(range(model.config.layers), unit="layer", disable=not sys.stderr.isatty()):
        layer = {path: jax.tree.map(lambda leaf: leaf[number], flat[path]) for path in stacked}  # noqa: B023
        layers.append(pending.layer(number, layer, rest, text))
    found = {
        path: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layer[path] for layer in layers)) for path in stacked
    }
    params = trees.unflatten(pending.after(rest) | found)
    return Model(model.config, params, model.execution, model.source, model.hf_config, model.chain), pending.report


class Calibration:
    """One pass over the layers of a model; holds what the pool's experts have seen, and the errors so far."""

    def __init__(self, config: ModelConfig, execution: ExecutionConfig, settings: Settings):
        _check(config)
        self.config, self.execution, self.settings = config, execution, settings
        self.report = CalibrationReport()
        self.pool = config.moe is not None and config.moe.placement == "shared"
        self._seen_by_pool: list[tuple[Any, Any, Any]] = []  # (normed, chosen, weights) of each layer and batch

    def before(self, rest: Leaves) -> Leaves:
        """Round the matrices outside layers but those of a pool, to nearest: their inputs are token ids or states."""
        return {path: leaf if self._of_pool(path) else self._plain(path, leaf) for path, leaf in rest.items()}

    def begin(self, rest: Leaves, batches: Iterable[Mapping[str, Any]]) -> Text:
        """Embed the calibration text."""
        embedding: Any = Embedding(self.config, self.execution)
        params = {"params": trees.unflatten(rest)["embedding"]}
        encode = jax.jit(partial(embedding.apply, method="encode"))
        text = Text([], [])
        for batch in batches:
            text.states.append(encode(params, jnp.asarray(batch["tokens"])))
            text.weights.append(jnp.asarray(batch["weights"]))
        if not text.states:
            raise UserError("no tokens to calibrate with: give a larger --data")
        return text

    def layer(self, number: int, layer: Leaves, rest: Leaves, text: Text) -> Leaves:
        """Quantise a layer, and run the text through the result. rest: leaves outside layers."""
        tree = trees.unflatten(layer)[STACK]
        seen = layer_moments(self.config, self.execution, tree, text.states, text.weights)
        layer = self._scaled(layer, seen)
        for record in self._matrices():
            if source_of(record) in seen:
                layer[record.path] = self._rounded(record, layer[record.path], seen[source_of(record)])
        if self.config.moe is not None:
            layer = self._mixture(number, layer, rest, text)
        tree, shared = trees.unflatten(layer)[STACK], self._shared(rest)
        text.states = [_run(self.config, self.execution, tree, shared, x_BTD) for x_BTD in text.states]
        return layer

    def after(self, rest: Leaves) -> Leaves:
        """Quantise the experts of a pool, from what all layers gave them; return all leaves outside layers."""
        if not self.pool:
            return rest
        routed = RoutedRows(*(list(parts) for parts in zip(*self._seen_by_pool, strict=True)))
        return self._experts(0, rest, routed)

    def _matrices(self) -> list[Parameter]:
        return [record for record in parameters(self.config) if record.stacked and record.path in self.settings.schemes]

    def _of_pool(self, path: str) -> bool:
        return self.pool and any(path == only_record(self.config, "experts", name).path for name in EXPERT)

    def _plain(self, path: str, leaf: Any) -> Any:
        record = next(record for record in parameters(self.config) if record.path == path)
        if path not in self.settings.schemes:
            return leaf
        return nearest_rounded(leaf, record, self.settings.schemes[record.path], self.settings.ranges).value

    def _rounded(self, record: Parameter, matrix: jax.Array, seen: Moments, calibrate: bool = True) -> Any:
        scheme = self.settings.schemes[record.path]
        gptq = self.settings.method == "gptq" and calibrate
        found = (gptq_rounded if gptq else nearest_rounded)(matrix, record, scheme, self.settings.ranges, seen)
        self.report.add(record.component, found)
        return found.value

    def _scaled(self, layer: Leaves, seen: dict[str, Moments]) -> Leaves:
        """Fold AWQ's scales into a layer, where the moments of the readers are known; they change with the scales."""
        for fold in folds(self.config) if self.settings.method == "awq" else ():
            source = source_of(fold.readers[0])
            if source in seen:
                scale_I = self._scales(fold, layer, seen[source])
                if scale_I is not None:
                    layer, seen[source] = fold.apply(layer, scale_I), seen[source].scaled(scale_I)
        return dict(layer)

    def _scales(self, fold: Fold, leaves: Leaves, seen: Moments) -> jax.Array | None:
        """Scales of the readers' inputs; None if no reader is quantised."""
        chosen = [record for record in fold.readers if record.path in self.settings.schemes]
        if not chosen:
            return None
        matrices = [as_matrix(leaves[record.path], record) for record in chosen]
        rounded = Values(self.settings.schemes[chosen[0].path], self.settings.ranges)
        return awq.input_scales(matrices, fold.shared(seen.mean_size_I), seen.hessian_II, rounded)[0]

    def _mixture(self, number: int, layer: Leaves, rest: Leaves, text: Text) -> Leaves:
        """Quantise a layer's experts; those of a pool are only noted what they see."""
        attended = self._attended(layer, rest, text)
        if self.settings.method == "awq" and not self.pool:
            normed = [normed_BTD for normed_BTD, _ in attended]
            seen = {source_of(only_record(self.config, "experts", "gate")): _moments_of(normed, text.weights)}
            layer = self._scaled(layer, seen)
            attended = self._attended(layer, rest, text)
        if self.pool:
            self._seen_by_pool += [(*pair, w_BT) for pair, w_BT in zip(attended, text.weights, strict=True)]
            return layer
        normed, chosen = (list(parts) for parts in zip(*attended, strict=True))
        return self._experts(number, layer, RoutedRows(normed, chosen, text.weights))

    def _attended(self, layer: Leaves, rest: Leaves, text: Text) -> list[tuple[jax.Array, jax.Array]]:
        """(inputs of the experts [B, T, D], chosen experts [B, T, A]) of each batch."""
        tree = trees.unflatten(layer)[STACK]
        router = {name: leaf for name, leaf in trees.unflatten(rest).items() if name == "router"} | tree
        found = (attend(self.config, self.execution, tree, router, x_BTD) for x_BTD in text.states)
        return [(normed_BTD, chosen_BTA) for _, normed_BTD, chosen_BTA, _ in found]

    def _experts(self, number: int, leaves: Leaves, routed: RoutedRows) -> Leaves:
        """Quantise experts one after the other, each from its own tokens."""
        gate, up, down = (only_record(self.config, "experts", name) for name in EXPERT)
        if gate.path not in self.settings.schemes:
            return leaves
        values: dict[str, list[Any]] = {record.path: [] for record in (gate, up, down)}
        assert self.config.moe is not None
        for expert in range(self.config.moe.experts):
            rows_RD, counted_R = routed.of(expert)
            enough = self.settings.method == "rtn" or routed.count(expert) >= self.settings.minimum_rows
            if not enough:
                self.report.rare.append((number, expert, routed.count(expert)))
            w = {record.path: leaves[record.path][expert] for record in (gate, up, down)}
            if self.settings.method == "awq" and enough:
                w = self._scaled_expert(w, rows_RD, counted_R)
            seen = expert_moments(rows_RD, counted_R)
            for record in (gate, up):
                values[record.path].append(self._rounded(record, w[record.path], seen, enough))
            inward = (dequantised(values[record.path][-1], jnp.float32) for record in (gate, up))
            hidden = expert_moments(hidden_rows(rows_RD, *inward), counted_R)
            values[down.path].append(self._rounded(down, w[down.path], hidden, enough))
        return leaves | {path: jax.tree.map(lambda *parts: jnp.stack(parts), *found) for path, found in values.items()}

    def _scaled_expert(self, w: Leaves, rows_RD: jax.Array, counted_R: jax.Array) -> Leaves:
        """Fold AWQ's scales of an expert's down matrix into its up matrix."""
        gate, up, _ = (only_record(self.config, "experts", name) for name in EXPERT)
        seen = expert_moments(hidden_rows(rows_RD, w[gate.path], w[up.path]), counted_R)
        fold = between(self.config, "experts")
        scale_F = self._scales(fold, w, seen)
        assert scale_F is not None
        return fold.apply(w, scale_F)

    def _shared(self, rest: Leaves) -> Shared:
        """The pool and router that all layers read, as far as the model has them."""
        tree, moe = trees.unflatten(rest), self.config.moe
        experts, router = None, None
        if moe is not None and moe.placement == "shared":
            pool: Any = ExpertPool(self.config, self.execution)
            experts, _ = pool.apply({"params": tree["experts"]})
        if moe is not None and moe.router == "shared":
            one: Any = Router(self.config, self.execution)
            router = one.apply({"params": tree["router"]})
        return Shared(experts, router)


def _check(config: ModelConfig) -> None:
    """Raise UserError for a model with a part whose inputs are not measured."""
    moe = config.moe
    parts = {
        "latent attention": config.latent is not None,
        "linear attention": config.linear is not None,
        "an output gate": config.output_gate,
        "zero-centred norms": config.norm == "centred_rms",
        "a window in some layers only": config.window_pattern is not None,
        "dense layers before experts": config.dense_layers > 0,
        "a clamped SwiGLU": config.feed_forward == "clamped_swiglu",
        "a block beside the experts": moe is not None and moe.shared_width is not None,
        "biased experts": moe is not None and moe.biases,
    }
    for part, present in parts.items():
        if present:
            raise UserError(f"calibration measures no model with {part}: choose --method=rtn")


EXPERT = ("gate", "up", "down")


@partial(jax.jit, static_argnums=(0, 1))
def _run(config: ModelConfig, execution: ExecutionConfig, params: Any, shared: Shared, x_BTD: jax.Array) -> jax.Array:
    """Run a layer on one batch."""
    block: Any = Block(config, execution)
    (x_BTD, _), _ = block.apply({"params": params}, (x_BTD, ()), positions(x_BTD), None, shared)
    return x_BTD


def _moments_of(states: list[jax.Array], weights: list[jax.Array]) -> Moments:
    total: Moments | None = None
    for x_BTD, weights_BT in zip(states, weights, strict=True):
        counted_R = (weights_BT.reshape(-1) > 0).astype(jnp.float32)
        found = expert_moments(x_BTD.reshape(counted_R.shape[0], -1), counted_R)
        total = found if total is None else total + found
    assert total is not None
    return total
