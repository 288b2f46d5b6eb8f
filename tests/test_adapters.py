"""Adapters: exact counts, the active path against the merged model, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import MODELS, initial_params, random_batch

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging, projections, targets
from moe_reduce.adapters.budget import within_budget
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, ModelConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models import deltas, products
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import abstract_params

PYTHIA_SHAPE = ModelConfig(
    vocab_size=50_304, layers=12, width=768, query_heads=12, key_value_heads=12, head_width=64, feed_forward_width=2048
)
EXECUTION = ExecutionConfig(platform="cpu", block_rows=8).resolve("cpu")
ADAPTER_METHODS = {
    "lora": AdapterConfig(rank=3, alpha=6.0),
    "rslora": AdapterConfig(method="rslora", rank=4, alpha=6.0),
    "dora": AdapterConfig(method="dora", rank=3),
    "skema": AdapterConfig(method="skema", sketch_width=5, alpha=2.0),
    "skema_gaussian": AdapterConfig(method="skema", sketch_width=5, projection="gaussian"),
    "skema_srht": AdapterConfig(method="skema", sketch_width=5, projection="srht"),
    "skema_low_rank": AdapterConfig(method="skema", sketch_width=5, alpha=50.0, core="low_rank", core_rank=2),
    "skema_trainable": AdapterConfig(method="skema", sketch_width=5, trainable_sketch=True),
}


def model_of(kind: str, dtype: str = "float32") -> Model:
    config = dataclasses.replace(MODELS[kind], init_std=0.3)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), initial_params(config))
    return Model(config, params, EXECUTION)


def disturbed(adapter: adapters.Adapter, seed: int = 1) -> adapters.Adapter:
    """With random numbers in every leaf that trains, as training would leave it."""
    keys = iter(jax.random.split(jax.random.key(seed), 200))

    def change(path, leaf):
        if not adapters.trained(adapter.config, path):
            return leaf
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)

    return dataclasses.replace(adapter, tree=trees.map_with_path(change, adapter.tree))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AdapterConfig(rank=8), 294_912),
        (AdapterConfig(rank=8, targets="q,v,k@10+11"), 319_488),
        (AdapterConfig(method="skema", sketch_width=116), 322_944),
        (AdapterConfig(method="dora", rank=8), 294_912 + 2 * 12 * 768),
        (AdapterConfig(method="skema", sketch_width=64, core="low_rank", core_rank=4), 24 * 2 * 64 * 4),
    ],
)
def test_counts_on_the_shape_of_pythia(config, expected):
    model = Model(PYTHIA_SHAPE, abstract_params(PYTHIA_SHAPE), EXECUTION)
    adapter = adapters.init(config, model)
    assert adapters.count(adapter) == expected
    assert adapters.trained_parameters(config, PYTHIA_SHAPE) == expected


@pytest.mark.parametrize(
    ("width", "parameters", "sketch", "rank"),
    [
        (2048, 65_536, 256, 16),
        (2048, 262_144, 512, 64),
        (4096, 65_536, 256, 8),
        (4096, 262_144, 512, 32),
        (4096, 1_048_576, 1024, 128),
    ],
)
def test_parity_of_a_budget(width, parameters, sketch, rank):
    """One map d -> d: SkeMA's k = √P against LoRA's r = P/2d."""
    model = ModelConfig(
        vocab_size=32, layers=1, width=width, query_heads=1, key_value_heads=1, head_width=width, feed_forward_width=8
    )
    skema = within_budget(AdapterConfig(method="skema", targets="q"), model, parameters)
    lora = within_budget(AdapterConfig(targets="q"), model, parameters)
    assert (skema.sketch_width, lora.rank) == (sketch, rank)


@pytest.mark.parametrize(
    ("changes", "name", "size"),
    [
        ({}, "rank", 10),
        ({"method": "skema"}, "sketch_width", 10),
        ({"method": "skema", "projection": "srht"}, "sketch_width", 16),
        ({"method": "skema", "projection": "gaussian"}, "sketch_width", 100),
        ({"method": "skema", "projection": "gaussian", "core": "low_rank", "core_rank": 1}, "sketch_width", 625),
    ],
)
def test_a_budget_buys_the_largest_size_that_there_is(changes, name, size):
    """10,000 parameters for eight maps of at least 10; of one map where the projections have no end."""
    layers = 1 if size == 100 else 8
    model = ModelConfig(
        vocab_size=32, layers=layers, width=12, query_heads=1, key_value_heads=1, head_width=10, feed_forward_width=8
    )
    chosen = within_budget(AdapterConfig(targets="q", **changes), model, 10_000)
    assert getattr(chosen, name) == size
    assert adapters.abstract(chosen, model)


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, "dense") for method in ADAPTER_METHODS]
    + [(method, kind) for method in ("lora", "skema", "skema_srht") for kind in ("layer", "pool")]
    + [("dora", "layer")],
)
def test_merged_is_active(method, kind):
    """And an untrained adapter changes nothing, bit for bit but for DoRA's division by a length."""
    words = "attention" if method == "dora" and kind != "dense" else "attention,mlp"
    config = dataclasses.replace(ADAPTER_METHODS[method], targets=words, layers="1")
    if method in ("skema", "skema_trainable"):
        config = dataclasses.replace(config, sketch_width=4)
    model = model_of(kind)
    tokens = random_batch()["tokens"]
    base = model(tokens)
    fresh = adapters.init(config, model)
    started = adapters.activate(model, fresh)(tokens)
    tolerance = {"dora": 1e-5, "skema_low_rank": 1e-3}.get(method, 0.0)  # a low-rank core starts near 0, not at it
    np.testing.assert_allclose(started, base, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(base))))
    adapter = disturbed(fresh)
    active = adapters.activate(model, adapter)
    found, merged = active(tokens), merging.merge(active, adapter)
    scale = float(jnp.max(jnp.abs(found)))
    assert float(jnp.max(jnp.abs(found - base))) > 1e-3 * scale, "the adapter does something"
    np.testing.assert_allclose(merged(tokens), found, rtol=0, atol=2e-5 * scale)
    changed = {
        path
        for path, leaf in trees.flatten(merged.params).items()
        if not np.array_equal(leaf, trees.flatten(model.params)[path])
    }
    assert changed == {target.path for target in targets.targets_of(config, model.config)}
    assert merging.unmerge(active).params == model.params


@pytest.mark.parametrize("dispatch", ["ragged", "grouped", "capacity", "reference"])
@pytest.mark.parametrize("method", ["lora", "skema"])
def test_every_dispatch_adapts_experts(dispatch, method):
    config = dataclasses.replace(ADAPTER_METHODS[method], targets="mlp")
    model = model_of("layer")
    adapter = disturbed(adapters.init(config, model))
    tokens = random_batch()["tokens"]
    other = dataclasses.replace(model, execution=dataclasses.replace(EXECUTION, dispatch=dispatch, capacity_factor=4.0))
    expected = adapters.activate(model, adapter)(tokens)
    np.testing.assert_allclose(adapters.activate(other, adapter)(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in ADAPTER_METHODS if name != "dora"])
def test_merged_is_active_in_float64(method):
    """Within 1e-6 where rounding plays no part: one linear map through the code that models run."""
    config = dataclasses.replace(ADAPTER_METHODS[method], targets="q")
    model = model_of("dense")
    (target,) = targets.targets_of(config, model.config)
    adapter = disturbed(adapters.init(config, model))
    with jax.enable_x64(True):
        first = {name: np.asarray(leaf)[0] for name, leaf in trees.flatten(merging.delta_of(adapter, target)).items()}
        delta = trees.unflatten(
            {name: jnp.asarray(leaf, "int32" if "rows" in name else "float64") for name, leaf in first.items()}
        )
        x = jnp.asarray(np.random.default_rng(0).standard_normal((20, target.in_features)))
        w = jnp.asarray(np.random.default_rng(1).standard_normal((target.in_features, target.out_features)))
        active = deltas.adapted(x, x @ w, lambda: w, delta, products.product)
        merged = x @ (w + merging.dense_delta(target, delta, jnp.float64).T)
        assert active.dtype == jnp.float64
        np.testing.assert_allclose(active, merged, rtol=1e-6, atol=1e-6)


def _flat(adapter):
    return trees.flatten(adapter.tree)


@pytest.mark.parametrize(("width", "rank"), [(5, 5), (12, 12)])
def test_rank_is_at_most_the_sketch(width, rank):
    config = AdapterConfig(method="skema", targets="q", sketch_width=width)
    model = model_of("dense")
    (target,) = targets.targets_of(config, model.config)
    adapter = disturbed(adapters.init(config, model))
    delta = jax.tree.map(lambda leaf: leaf[0], merging.delta_of(adapter, target))
    assert np.linalg.matrix_rank(np.asarray(merging.dense_delta(target, delta), np.float64), tol=1e-5) == rank


@pytest.mark.parametrize(("width", "size"), [(5, 16), (16, 16), (7, 100)])
def test_projections(width, size):
    made = {name: projections.make(name, width, size, 3, "q") for name in ("orthonormal", "gaussian", "srht")}
    rows = projections.dense(made["orthonormal"], size)
    np.testing.assert_allclose(rows @ rows.T, np.eye(width), atol=1e-6)
    padded = len(made["srht"]["signs"])
    whole = projections.dense(made["srht"], padded)
    np.testing.assert_allclose(whole @ whole.T, np.eye(width), atol=1e-6)
    x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    signs, chosen = jnp.asarray(made["srht"]["signs"]), jnp.asarray(made["srht"]["rows"])
    dense = projections.dense(made["srht"], size)
    np.testing.assert_allclose(deltas.srht(jnp.asarray(x), signs, chosen), x @ dense.T, atol=1e-5)
    z = x[:, :width]
    np.testing.assert_allclose(deltas.srht_transposed(jnp.asarray(z), signs, chosen, size), z @ dense, atol=1e-5)
    assert abs(made["gaussian"]["matrix"].std() * np.sqrt(width) - 1) < 0.35
    for name, first in made.items():
        again = projections.make(name, width, size, 3, "q")
        assert projections.digest(again) == projections.digest(first)
        assert projections.digest(projections.make(name, width, size, 4, "q")) != projections.digest(first)
        assert projections.digest(projections.make(name, width, size, 3, "k")) != projections.digest(first)


@pytest.mark.parametrize("size", [1, 2, 8, 32, 512])
def test_hadamard_is_the_matrix(size):
    x = np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)
    expected = x @ deltas.hadamard_matrix(size) / np.sqrt(size)
    np.testing.assert_allclose(deltas.hadamard(jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"targets": "q,z"}, "the model has no 'z'"),
        ({"targets": "q,attention"}, "names q twice"),
        ({"layers": "7"}, "adapter.layers='7'"),
        ({"layers": "top:3"}, "adapter.layers='top:3'"),
        ({"rank": None}, "adapter.rank must be positive"),
        ({"sketch_width": 4}, "adapter.sketch_width is not for lora"),
        ({"method": "skema", "rank": None, "sketch_width": 9, "targets": "k"}, "exceeds 8"),
        ({"method": "skema", "rank": None, "sketch_width": 4, "core": "low_rank"}, "low_rank needs a rank"),
        ({"trainable_sketch": True}, "adapter.trainable_sketch is for skema"),
        ({"core_std": -1.0}, "adapter.core_std must be at least 0"),
        ({"seed": -1}, "adapter.seed must be at least 0"),
        ({"alpha": 0.0}, "adapter.alpha must be positive"),
        ({"rank": 9, "targets": "k"}, "exceeds 8"),
    ],
)
def test_mistakes_are_one_line(changes, part):
    with pytest.raises(UserError, match=part.replace("[", "\\[")):
        adapters.abstract(AdapterConfig(**{"rank": 2} | changes), model_of("dense").config)
    with pytest.raises(UserError, match=part.replace("[", "\\[")):
        adapters.init(AdapterConfig(**{"rank": 2} | changes), model_of("dense"))


@pytest.mark.parametrize("kind", ["dense", "layer", "pool"])
@pytest.mark.parametrize("method", list(ADAPTER_METHODS))
def test_shapes_are_known_without_numbers(method, kind):
    config = dataclasses.replace(ADAPTER_METHODS[method], targets="attention" if method == "dora" else "attention,mlp")
    if "skema" in method:
        config = dataclasses.replace(config, sketch_width=4)
    model = model_of(kind)
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in _flat(adapters.init(config, model)).items()}
    planned = trees.flatten(adapters.abstract(config, model.config))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in planned.items()} == shapes


def test_experts_of_a_pool_belong_to_no_layer():
    with pytest.raises(UserError, match="'up@1' names layers, but the pool belongs to all"):
        adapters.init(AdapterConfig(rank=2, targets="q@1,up@1"), model_of("pool"))


def test_experts_refuse_dora():
    with pytest.raises(UserError, match="these targets are experts"):
        adapters.init(AdapterConfig(method="dora", rank=2, targets="mlp"), model_of("layer"))


def test_merging_is_for_good():
    model = model_of("dense")
    adapter = disturbed(adapters.init(AdapterConfig(rank=2), model))
    merged = merging.merge(model, adapter)
    with pytest.raises(UserError, match="has been merged into this model before"):
        merging.merge(merged, adapter)
    with pytest.raises(UserError, match="a merge cannot be undone"):
        merging.unmerge(merged)
    with pytest.raises(UserError, match="this model already has an active adapter"):
        adapters.activate(adapters.activate(model, adapter), adapter)
    other = model_of("layer")
    with pytest.raises(UserError, match="this base needs"):
        merging.merge(dataclasses.replace(other, config=dataclasses.replace(other.config, layers=1)), adapter)
    assert json.loads(json.dumps(merged.chain[-1].arguments)) == merged.chain[-1].arguments


def test_only_what_trains_gets_a_gradient():
    """Every trained leaf of every method has one; the base has none where it is not asked for."""
    model = model_of("layer")
    tokens = random_batch()["tokens"]
    for method, config in ADAPTER_METHODS.items():
        words = "attention" if method == "dora" else "attention,mlp"
        config = dataclasses.replace(config, targets=words, **({"sketch_width": 4} if "skema" in method else {}))
        adapter = disturbed(adapters.init(config, model))
        active = adapters.activate(model, adapter)

        def loss(tree, active=active):
            changed = dataclasses.replace(active, params=active.params | {"adapter": tree})
            return jnp.mean(jnp.square(changed(tokens)))

        flat = _flat(adapter)
        fixed = {path: leaf for path, leaf in flat.items() if not adapters.trained(config, path)}
        learned = {path: leaf for path, leaf in flat.items() if adapters.trained(config, path)}
        gradients = jax.grad(lambda part, fixed=fixed: loss(trees.unflatten(part | fixed)))(learned)
        for path, gradient in gradients.items():
            assert float(jnp.max(jnp.abs(gradient))) > 0, (method, path)
