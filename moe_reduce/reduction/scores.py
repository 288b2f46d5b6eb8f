"""Scores of how much each expert matters, by REAP (arXiv:2510.13999) and other criteria, from one pass over a corpus.

Letters: N layers, E experts a layer (or of the shared pool), S tokens. For an assignment of a token x to an expert e,
g is the combine weight that the model uses and f the output of the expert before weighting.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_reduce.core import json_files
from moe_reduce.core.config import DISPATCH_BY_PLATFORM, ExecutionConfig, ModelConfig, MoEConfig
from moe_reduce.core.disk import write_json
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.models.model import Model
from moe_reduce.reduction.transform import moe_of
from moe_reduce.training.sharding import compiled

TINY = np.float32(1e-30)  # divisor for a layer whose total is 0


@dataclass(frozen=True)
class Sums:
    """Statistics of one pass, summed over tokens for each layer and expert: arrays [N, E].

    Each batch is summed in fp32, and batches are added in float64. Adding a batch is exact unless it adds less than
    2^-29 of an expert's total, so sums do not depend on how batches are divided among passes. Scores are rounded to
    fp32.
    """

    tokens: int
    counts: np.ndarray
    weight: np.ndarray  # Σ g
    weighted_norm: np.ndarray  # Σ g·‖f‖₂
    norm: np.ndarray  # Σ ‖f‖₂
    maximum: np.ndarray  # max |f|
    largest: np.ndarray  # max f, at least 0

    def __add__(self, other: "Sums") -> "Sums":
        both = {name: combining(name)(getattr(self, name), getattr(other, name)) for name in STATISTICS}
        return Sums(self.tokens + other.tokens, **both)

    def pooled(self) -> "Sums":
        """Combine the statistics of all layers that call a shared pool, [1, E]."""
        rows = {name: combining(name).reduce(getattr(self, name), axis=0, keepdims=True) for name in STATISTICS}
        return Sums(self.tokens, **rows)


STATISTICS = tuple(field.name for field in dataclasses.fields(Sums) if field.name != "tokens")


def combining(statistic: str) -> np.ufunc:
    """Return the ufunc that combines two values of a statistic: maximum for maxima, add for all others."""
    return np.maximum if statistic in ("maximum", "largest") else np.add


def sums_of(assignments: dict[str, jax.Array], weights_BT: jax.Array, experts: int) -> dict[str, jax.Array]:
    """Sum the statistics of one layer call by expert, [E] each. Tokens of weight 0 do not count.

    assignments: expert, weight, norm, maximum and largest of each assignment, [B, T, A], as Model.apply collects them.
    """
    counted_BTA = (weights_BT > 0)[:, :, None].astype(jnp.float32)
    index = assignments["expert"].reshape(-1)
    norm_BTA = assignments["norm"] * counted_BTA

    def total(values_BTA: jax.Array) -> jax.Array:
        return jnp.zeros(experts, jnp.float32).at[index].add(values_BTA.reshape(-1))

    def highest(values_BTA: jax.Array) -> jax.Array:
        return jnp.zeros(experts, jnp.float32).at[index].max((values_BTA * counted_BTA).reshape(-1))

    return {
        "counts": total(jnp.broadcast_to(counted_BTA, norm_BTA.shape)),
        "weight": total(assignments["weight"] * counted_BTA),
        "weighted_norm": total(assignments["weight"] * norm_BTA),
        "norm": total(norm_BTA),
        "maximum": highest(assignments["maximum"]),
        "largest": highest(assignments["largest"]),
    }


def collect(model: Model, batches: Iterable[Any], mesh: Mesh | None = None) -> Sums:
    """Stream batches through the model, on a mesh if one is given; a dropless dispatch replaces `capacity`.

    Raises UserError when the model has no experts, when the mesh splits their outputs, when there is no batch, or when
    outputs are not finite.
    """
    moe = moe_of(model.config)
    if mesh is not None and mesh.shape["tensor"] > 1:
        raise UserError("experts are scored by their whole outputs, which mesh.tensor > 1 splits: set mesh.tensor=1")
    execution = model.execution
    if execution.dispatch == "capacity":  # a dropped assignment would count as an output of 0
        execution = dataclasses.replace(execution, dispatch=DISPATCH_BY_PLATFORM[execution.platform])
    step = _step(model.config, moe, execution, mesh)
    found: Sums | None = None
    for batch in batches:
        tokens, by_name = step(model.params, batch)
        added = Sums(int(tokens), **fetched(by_name))
        found = added if found is None else found + added
    if found is None:
        raise UserError("no tokens to score with: give a larger --data")
    if not np.all(np.isfinite(found.weighted_norm)):
        raise UserError(f"outputs of experts are not finite in {execution.compute_dtype}: the weights are damaged")
    return found


def fetched(sums: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Fetch the sums of one batch from the device, as float64."""
    return {name: values.astype(np.float64) for name, values in jax.device_get(sums).items()}


@cache  # one compiled program for all passes over models of one shape
def _step(config: ModelConfig, moe: MoEConfig, execution: ExecutionConfig, mesh: Mesh | None) -> Callable[..., Any]:
    skeleton = Model(config, {}, execution)

    def sums(params, batch):
        routed = skeleton.with_params(params).apply(batch, collect=("assignments",)).collected["assignments"]
        by_name = jax.vmap(lambda layer: sums_of(layer, batch["weights"], moe.experts))(routed)
        return jnp.sum(batch["weights"] > 0), by_name

    return compiled(sums, mesh)


def _mean(total: np.ndarray, sums: Sums) -> np.ndarray:
    return total / np.maximum(sums.counts, 1)


def _share_of_layer(total: np.ndarray) -> np.ndarray:
    return total / np.maximum(np.sum(total, axis=1, keepdims=True), TINY)


# sums -> scores [N, E], over the tokens routed to an expert unless a comment says otherwise
FORMULAS: dict[str, Callable[[Sums], np.ndarray]] = {
    "reap": lambda sums: _mean(sums.weighted_norm, sums),  # mean of g·‖f‖₂
    "reap_total": lambda sums: sums.weighted_norm / np.float32(sums.tokens),  # mean over ALL tokens, so usage matters
    # share of its layer's sum; in a pool, the largest share in any layer (our own criterion)
    "reap_share": lambda sums: _share_of_layer(sums.weighted_norm),
    "frequency": lambda sums: sums.counts,  # number of tokens
    "weighted_expert_frequency_sum": lambda sums: sums.weight,  # sum of g
    "ean_mean": lambda sums: _mean(sums.norm, sums),  # mean of ‖f‖₂
    "ean_sum": lambda sums: sums.norm,  # sum of ‖f‖₂
    "weighted_ean_sum": lambda sums: sums.weighted_norm,  # sum of g·‖f‖₂
    "max_activation": lambda sums: sums.maximum,  # largest |f|
    "max_activations": lambda sums: sums.largest,  # largest f, at least 0, as REAP's code has it
}
CRITERIA = (*FORMULAS, "random")  # random: for comparison


def check_criteria(names: Iterable[str]) -> None:
    """Raises UserError when a criterion is unknown."""
    for name in names:
        if name not in CRITERIA:
            raise UserError(f"criterion {name!r} is unknown; known: {', '.join(CRITERIA)}")


def criterion(name: str, sums: Sums, seed: int = 0) -> np.ndarray:
    """Compute the scores of one criterion, fp32 [N, E].

    Higher is more worth keeping; an expert that no token was routed to has 0. seed: for the random criterion.
    Raises UserError when the criterion is unknown.
    """
    check_criteria([name])
    random = np.random.default_rng(seed)
    values = random.random(sums.counts.shape, np.float32) if name == "random" else FORMULAS[name](sums)
    return np.where(sums.counts > 0, values, 0).astype(np.float32)


@dataclass(frozen=True)
class Scores:
    """Counts and the scores of each criterion, [N, E] (N = 1 for a shared pool), as the command `score` writes them."""

    tokens: int
    counts: np.ndarray
    scores: dict[str, np.ndarray]
    counts_by_layer: np.ndarray | None = None  # counts of a shared pool by layer call, [N, E]
    model: Input | None = None  # the model that was scored; None in older files and within a run

    def of(self, name: str) -> np.ndarray:
        """Return the scores of one criterion, [N, E]; raises UserError when it was not scored."""
        if name not in self.scores:
            raise UserError(f"criterion {name!r} was not scored: choose one of {', '.join(self.scores)}")
        return self.scores[name]


def scores(moe: MoEConfig, sums: Sums, criteria: Iterable[str], seed: int = 0) -> Scores:
    """Score the experts of a model under several criteria, from the sums of one pass."""
    shared = moe.placement == "shared"
    rows = sums.pooled() if shared else sums
    by_name = {name: criterion(name, rows, seed) for name in criteria}
    if shared and "reap_share" in by_name:
        # Outputs grow with depth, so that a sum over layers undervalues the experts that early layers need. Models that
        # are not retrained lose less if experts are chosen by the largest share; retrained models lose less by the sum.
        by_name["reap_share"] = np.max(criterion("reap_share", sums), axis=0, keepdims=True)
    return Scores(sums.tokens, rows.counts, by_name, sums.counts if shared else None)


def write(found: Scores, file: Path) -> None:
    """Write scores as JSON: tokens, counts, scores, and counts_by_layer and model where they are known."""
    content: dict[str, Any] = {
        "tokens": found.tokens,
        "counts": found.counts.tolist(),
        "scores": {name: values.tolist() for name, values in found.scores.items()},
    }
    if found.counts_by_layer is not None:
        content["counts_by_layer"] = found.counts_by_layer.tolist()
    if found.model is not None:
        content["model"] = dataclasses.asdict(found.model)
    write_json(file, content, indent=None)


def write_arrays(sums: Sums, file: Path) -> None:
    """Write the sums of every layer call as .npz."""
    np.savez(file, **{name: getattr(sums, name) for name in ("tokens", *STATISTICS)})


def read(file: Path) -> Scores:
    """Read a file that `write` wrote; raises UserError when it has another format or damaged numbers."""
    try:
        content = json_files.parse(file.read_bytes(), file, "make it with moe-reduce score")
        by_name = {name: np.asarray(values, np.float32) for name, values in content["scores"].items()}
        counts = np.asarray(content["counts"], np.float32)
        by_layer = np.asarray(content["counts_by_layer"], np.float32) if "counts_by_layer" in content else None
        tokens = int(content["tokens"])
        model = Input(**content["model"]) if "model" in content else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} holds no scores ({error!r}): make it with moe-reduce score") from None
    for name, values in by_name.items():
        if values.shape != counts.shape or counts.ndim != 2 or not np.all(np.isfinite(values)):
            raise UserError(f"{file}: scores of {name} are not finite numbers of shape {counts.shape}: make it again")
    for rows in (counts, counts if by_layer is None else by_layer):
        whole = rows.ndim == 2 and rows.shape[1:] == counts.shape[1:] and np.all((rows >= 0) & (rows < np.inf))
        if not whole or tokens < 0:
            raise UserError(f"{file}: counts and tokens must be numbers of at least 0, by expert: make it again")
    if model is not None and not (isinstance(model.path, str) and isinstance(model.sha256, str)):
        raise UserError(f"{file}: model must be a path and a hash: make it again")
    return Scores(tokens, counts, by_name, by_layer, model)
