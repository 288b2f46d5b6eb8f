"""Adapters on abstract leaves: the same code gives the shapes, dtypes and config that it gives on arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantised_models import quantise_int8
from test_adapters import ADAPTER_METHODS, disturbed, model_of
from training_runs import random_batch

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig
from moe_reduce.models.model import Model

KINDS = ("dense", "neox", "layer", "pool", "shared")  # neox: biases, GELU; layer, pool, shared: experts
MIXTURES = ("layer", "pool", "shared")
SKEMA = {
    f"skema_{projection}_{core}{'_trained' if trained else ''}": AdapterConfig(
        method="skema", sketch_width=4, projection=projection, core=core, trainable_sketch=trained,
        core_rank=2 if core == "low_rank" else None,
    )
    for projection in ("orthonormal", "gaussian", "srht")
    for core in ("full", "low_rank")
    for trained in (False, True)
    if not (trained and projection == "srht")
}  # fmt: skip
CONFIGS = {name: ADAPTER_METHODS[name] for name in ("lora", "rslora", "dora")} | SKEMA


def config_of(method: str, kind: str) -> AdapterConfig:
    words = "attention" if method == "dora" and kind in MIXTURES else "attention,mlp"
    return dataclasses.replace(CONFIGS[method], targets=words, layers="top:1")


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def shapes(tree: trees.Tree) -> dict:
    return {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in trees.flatten(tree).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(CONFIGS))
def test_init_activate_merge_and_unmerge(method, kind):
    config = config_of(method, kind)
    real = model_of(kind, "bfloat16")
    planned = dataclasses.replace(real, params=abstract(real.params))
    adapter, planned_adapter = adapters.init(config, real), adapters.init(config, planned)
    assert shapes(planned_adapter.tree) == shapes(adapter.tree)
    assert shapes(adapters.abstract(config, real.config)) == shapes(adapter.tree)
    assert (
        adapters.count(planned_adapter) == adapters.count(adapter) == adapters.trained_parameters(config, real.config)
    )

    def steps(model: Model, own: adapters.Adapter) -> list[Model]:
        active = adapters.activate(model, own)
        return [active, merging.merge(active, own), merging.unmerge(active)]

    for found, wanted in zip(steps(planned, planned_adapter), steps(real, adapter), strict=True):
        assert shapes(found.params) == shapes(wanted.params)
        assert found.config == wanted.config
        assert [step.command for step in found.chain] == [step.command for step in wanted.chain]
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in trees.flatten(found.params).values())


@pytest.mark.parametrize(("method", "kind"), [("lora", "layer"), ("dora", "dense"), ("skema_orthonormal_full", "pool")])
def test_a_quantised_base(method, kind):
    """Matrices that are merged into become float32; the merged model is the adapted one, real and planned."""
    config, real = config_of(method, kind), quantise_int8(model_of(kind))
    planned = dataclasses.replace(real, params=abstract(real.params))
    adapter, planned_adapter = disturbed(adapters.init(config, real)), adapters.init(config, planned)
    assert shapes(planned_adapter.tree) == shapes(adapter.tree)
    active, merged = adapters.activate(real, adapter), merging.merge(real, adapter)
    assert shapes(merging.merge(planned, planned_adapter).params) == shapes(merged.params)
    flat = trees.flatten(merged.params)
    assert {flat[target.path].dtype.name for target in targets_of(config, real.config)} == {"float32"}
    tokens = random_batch()["tokens"]
    expected = active(tokens)
    scale = float(jnp.max(jnp.abs(expected)))
    assert float(jnp.max(jnp.abs(expected - real(tokens)))) > 1e-3 * scale
    np.testing.assert_allclose(merged(tokens), expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("method", ["lora", "dora", "skema_srht_full"])
def test_steps_are_traced(method):
    """The same steps inside jax.eval_shape, where parameters are tracers."""
    config, real = config_of(method, "dense"), model_of("dense")

    def adapted(params):
        model = real.with_params(params)
        return merging.merge(model, adapters.init(config, model)).params

    assert shapes(jax.eval_shape(adapted, real.params)) == shapes(real.params)


def test_abstract_leaves_have_no_hash():
    """A plan may merge twice: there are no values to recognise an adapter by."""
    real = model_of("dense")
    planned = dataclasses.replace(real, params=abstract(real.params))
    adapter = adapters.init(CONFIGS["lora"], planned)
    assert merging.digest(adapter) is None
    merged = merging.merge(merging.merge(planned, adapter), adapter)
    assert [step.arguments["adapter"] for step in merged.chain] == [None, None]


def test_targets_come_from_the_records():
    """Words find matrices by component and name; the shape of each is that of its record."""
    for kind in KINDS:
        model = model_of(kind)
        config = AdapterConfig(rank=1, targets="attention,mlp")
        for target in targets_of(config, model.config):
            leaf = trees.flatten(model.params)[target.path]
            assert target.experts == (4 if kind in MIXTURES and target.parameter.component == "experts" else None)
            assert (target.layers is None) == (kind in ("pool", "shared") and target.experts is not None)
            stacked = (1 if target.layers is None else model.config.layers) * (target.experts or 1)
            assert stacked * target.in_features * target.out_features == leaf.size
