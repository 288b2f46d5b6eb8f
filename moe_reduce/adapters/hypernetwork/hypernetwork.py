"""Hypernetwork as one value, and the adapters that it writes: a bank for a batch, or one Adapter.

The leaves that a head emits are completed by fixed ones, which are the same in every adapter: the scale, the layer
numbers, and SkeMA's projections. Parameters are stored in params["hypernetwork"] where they train beside a base.

With statistics, a head emits z-scores: each value is multiplied with the standard deviation, and the mean is added, of
that value in a library of trained adapters.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_reduce.adapters.adapter import Adapter
from moe_reduce.adapters.checks import check_new
from moe_reduce.adapters.hypernetwork.layout import layout_of
from moe_reduce.adapters.hypernetwork.network import Emitted, Network
from moe_reduce.adapters.leaves import is_abstract, leaves_of, trained_names
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.hypernetwork_config import HypernetworkConfig
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import Parameter, Records, abstract_params

HYPERNETWORK = "hypernetwork"  # key beside a base's parameters
FROZEN = "hypernetwork_frozen"  # key of the fixed leaves and the statistics
SMALLEST_DEVIATION = 1e-8  # values that are equal in all adapters have z-scores of zero


class Statistics(NamedTuple):
    """Mean and standard deviation of each emitted value over a library of adapters, by path of its leaf."""

    mean: Emitted
    deviation: Emitted


@dataclass(frozen=True, eq=False)
class Hypernetwork:
    """A hypernetwork for one base; its leaves are real or abstract."""

    config: HypernetworkConfig
    base: ModelConfig
    width: int  # of the description's embedding
    params: dict[str, Any]
    fixed: Mapping[str, Any]  # leaves that every adapter has in common, by path
    statistics: Statistics | None = None

    @property
    def network(self) -> Network:
        """The Flax module."""
        return Network(layout_of(self.config, self.base), self.config.dropout)

    def with_params(self, params: dict[str, Any]) -> "Hypernetwork":
        """Copy with other parameters."""
        return dataclasses.replace(self, params=params)


def init(config: HypernetworkConfig, base: Model, width: int) -> Hypernetwork:
    """A new hypernetwork, whose adapters change nothing; abstract if the base's parameters are.

    width: of the description's embedding. Raises UserError if the configuration does not fit the base.
    """
    config.check()
    check_new(config.adapter, base.config)
    network = Network(layout_of(config, base.config), config.dropout)
    start = partial(_initial, network, width, config.seed)
    params = jax.eval_shape(start) if is_abstract(base.params) else jax.jit(start)()
    return Hypernetwork(config, base.config, width, params, fixed_leaves(config, base))


def fixed_leaves(config: HypernetworkConfig, base: Model) -> dict[str, Any]:
    """Leaves that every adapter has in common, by path; abstract if the base's parameters are."""
    emitted = trained_names(config.adapter)
    # LoRA and SkeMA start from no weight of the base: a leaf only asks it whether it is abstract
    weight = jax.ShapeDtypeStruct((), jnp.float32) if is_abstract(base.params) else None
    return {
        f"{target.path}/{name}": leaf.init(target, weight)
        for target in targets_of(config.adapter, base.config)
        for name, leaf in leaves_of(config.adapter, target).items()
        if name not in emitted
    }


def abstract(config: HypernetworkConfig, base: ModelConfig, width: int) -> Hypernetwork:
    """`init` on abstract leaves."""
    return init(config, Model(base, abstract_params(base), ExecutionConfig()), width)


def count(hypernetwork: Hypernetwork) -> int:
    """Number of trained parameters."""
    return trees.size(hypernetwork.params)


def emit(hypernetwork: Hypernetwork, embeddings_ZW: jax.Array, dropout_key: jax.Array | None = None) -> Emitted:
    """Trained leaves of Z adapters, by path: [Z, N, I, R], [Z, N, R, O] or [Z, N, K, K], with experts [Z, N, E, ...].

    dropout_key: key of the network's dropout; None for none.
    """
    return _emit(hypernetwork.network, hypernetwork.params, hypernetwork.statistics, embeddings_ZW, dropout_key)


def bank(hypernetwork: Hypernetwork, emitted: Emitted) -> dict[str, Any]:
    """Tree of a bank of Z adapters (models/deltas.py), of which batch["adapter"] gives each row its entry.

    Emitted leaves have Z in front of their last two axes; the fixed ones, which all entries share, have none.
    """
    return trees.unflatten(dict(hypernetwork.fixed) | {path: jnp.moveaxis(x, 0, -3) for path, x in emitted.items()})


def written(hypernetwork: Hypernetwork, embeddings_ZW: Any) -> list[Adapter]:
    """An ordinary adapter for each description, all written by one call.

    Raises UserError for embeddings of another width.
    """
    check_width(hypernetwork, embeddings_ZW.shape[-1])
    embeddings_ZW = jnp.asarray(embeddings_ZW, jnp.float32)
    emitted = _compiled(hypernetwork.network, hypernetwork.params, hypernetwork.statistics, embeddings_ZW)
    return [
        Adapter(
            hypernetwork.config.adapter,
            trees.unflatten(dict(hypernetwork.fixed) | {path: leaf[z] for path, leaf in emitted.items()}),
        )
        for z in range(len(embeddings_ZW))
    ]


def check_width(hypernetwork: Hypernetwork, width: int) -> None:
    """Raise UserError for embeddings of another width than the hypernetwork reads."""
    if width != hypernetwork.width:
        raise UserError(
            f"hypernetwork reads embeddings of width {hypernetwork.width} ({hypernetwork.config.encoder}), and these "
            f"have {width}: give the encoder that it was trained with"
        )


def z_scored(hypernetwork: Hypernetwork, library: Sequence[Adapter]) -> Hypernetwork:
    """The hypernetwork with the statistics of a library, from which its heads emit z-scores.

    Heads start at zero: at the mean of the library. Raises UserError for a library of another configuration.
    """
    leaves = [emitted_of(hypernetwork, adapter) for adapter in library]
    if len(leaves) < 2:
        raise UserError(f"z-scores need a library of at least 2 adapters, got {len(leaves)}: give more")
    stacked = {path: jnp.stack([found[path] for found in leaves]) for path in leaves[0]}
    mean = {path: jnp.mean(leaf, axis=0) for path, leaf in stacked.items()}
    deviation = {path: jnp.maximum(jnp.std(leaf, axis=0), SMALLEST_DEVIATION) for path, leaf in stacked.items()}
    heads = {name: jax.tree.map(jnp.zeros_like, x) for name, x in hypernetwork.params.items() if name != "trunk"}
    return dataclasses.replace(hypernetwork, params=hypernetwork.params | heads, statistics=Statistics(mean, deviation))


def frozen(hypernetwork: Hypernetwork) -> dict[str, Any]:
    """Tree of what stays fixed beside the parameters, below FROZEN; `with_leaves` reads it."""
    statistics = hypernetwork.statistics
    found = {} if statistics is None else {"mean": statistics.mean, "deviation": statistics.deviation}
    parts = {"fixed": dict(hypernetwork.fixed), **found}
    return {FROZEN: {name: trees.unflatten(leaves) for name, leaves in parts.items()}}


def with_leaves(hypernetwork: Hypernetwork, params: Mapping[str, Any]) -> Hypernetwork:
    """The hypernetwork with the leaves that a training loop holds below HYPERNETWORK and FROZEN."""
    parts = {name: trees.flatten(tree) for name, tree in params[FROZEN].items()}
    statistics = Statistics(parts["mean"], parts["deviation"]) if "mean" in parts else None
    return dataclasses.replace(hypernetwork, params=params[HYPERNETWORK], fixed=parts["fixed"], statistics=statistics)


def records(hypernetwork: Hypernetwork) -> Records:
    """Records of the leaves below HYPERNETWORK and FROZEN. Replicated on every device; matrices decay."""
    return replicated({HYPERNETWORK: hypernetwork.params} | frozen(hypernetwork))


def replicated(tree: Mapping[str, Any]) -> Records:
    """Records of fp32 leaves outside a model, such as those of a bank; kernels of Flax's layers decay."""
    return {
        path: Parameter(
            path=path,
            axes="UVWXYZ"[: len(leaf.shape)],
            shape=tuple(leaf.shape),
            init=jax.nn.initializers.zeros,
            component=HYPERNETWORK,
            decays=path.endswith("/kernel"),
            precision="float32",
            mesh_axes=(None,) * len(leaf.shape),
        )
        for path, leaf in trees.flatten(dict(tree)).items()
    }


def _emit(
    network: Network, params: Any, statistics: Statistics | None, embeddings_ZW: jax.Array, key: jax.Array | None = None
) -> Emitted:
    rngs = {} if key is None else {"dropout": key}
    leaves: Any = network.apply({"params": params}, embeddings_ZW, key is None, rngs=rngs)
    if statistics is None:
        return leaves
    return {
        path: leaf * statistics.deviation[path][None] + statistics.mean[path][None] for path, leaf in leaves.items()
    }


_compiled = jax.jit(_emit, static_argnums=0)


def _initial(network: Network, width: int, seed: int) -> dict[str, Any]:
    variables: Any = network.init(jax.random.key(seed), jnp.zeros((1, width)))
    return variables["params"]


def emitted_of(hypernetwork: Hypernetwork, adapter: Adapter) -> Emitted:
    """The leaves of an adapter that the hypernetwork emits. Raises UserError for one of another configuration."""
    config = adapter.config
    if config.method != "skema":  # the seed of LoRA's start does not matter any more
        config = dataclasses.replace(config, seed=hypernetwork.config.adapter.seed)
    if config != hypernetwork.config.adapter:
        raise UserError(
            f"library holds an adapter of {adapter.config}, and the hypernetwork writes {hypernetwork.config.adapter}: "
            "give adapters of one configuration"
        )
    flat = trees.flatten(adapter.tree)
    return {path: jnp.asarray(leaf) for path, leaf in flat.items() if path not in hypernetwork.fixed}
