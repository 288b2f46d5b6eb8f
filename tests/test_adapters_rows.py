"""Rows of one batch with different adapters: each equals the same row alone with its own, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantised_models import quantise_int8
from test_adapters import ADAPTER_METHODS, EXECUTION, disturbed, model_of
from test_generate import PROMPTS, whole_greedy
from test_generate import model_of as unprepared
from training_runs import random_batch

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import bank, merging
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, GenerateConfig, MeshConfig
from moe_reduce.core.errors import UserError
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models.deltas import BANK
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import records
from moe_reduce.training import sharding

ROWS = (2, 0, 1, 3, 2)  # entries; 3 is none
LORA, SKEMA = ADAPTER_METHODS["lora"], dataclasses.replace(ADAPTER_METHODS["skema"], sketch_width=4)
SRHT = dataclasses.replace(SKEMA, projection="srht")
MIXED = {
    "lora": [
        LORA,
        dataclasses.replace(LORA, rank=2, seed=1, alpha=None),
        dataclasses.replace(LORA, layers="1", seed=2),
    ],
    "skema": [SKEMA, SKEMA, dataclasses.replace(SKEMA, alpha=None)],
    "skema of other seeds": [SKEMA, dataclasses.replace(SKEMA, seed=1), dataclasses.replace(SKEMA, sketch_width=3)],
    "srht": [SRHT, SRHT, SRHT],
    "all": [SRHT, ADAPTER_METHODS["rslora"], ADAPTER_METHODS["skema_low_rank"]],
}


def trained_adapters(methods: str, model: Model) -> list[adapters.Adapter]:
    words = "attention,mlp" if model.config.moe is None else "attention,mlp,router"
    configs = [dataclasses.replace(config, targets=words) for config in MIXED[methods]]
    if methods == "all":
        configs[2] = dataclasses.replace(configs[2], targets="q,up", sketch_width=4)
    return [disturbed(adapters.init(config, model), seed) for seed, config in enumerate(configs)]


def tokens_of_rows() -> jax.Array:
    return jnp.concatenate([random_batch()["tokens"]] * 5)[: len(ROWS), :12]


def alone(model: Model, adapter: adapters.Adapter | None, tokens: jax.Array) -> jax.Array:
    return (model if adapter is None else adapters.activate(model, adapter))(tokens)


def run(model: Model, tokens: jax.Array, entries=ROWS) -> jax.Array:
    """Logits, by one program: outside jit each operation is compiled by itself."""
    batch = {"tokens": tokens, "adapter": jnp.asarray(entries, jnp.int32)}
    return jax.jit(lambda params, batch: model.with_params(params).apply(batch).logits_BTV)(model.params, batch)


@pytest.mark.parametrize(
    ("kind", "methods"),
    [("dense", methods) for methods in MIXED]
    + [("layer", "lora"), ("layer", "all"), ("pool", "skema of other seeds"), ("pool", "srht")],
)
def test_each_row_is_that_of_its_adapter(kind, methods):
    model = model_of(kind)
    each = [*trained_adapters(methods, model), None]
    tokens = tokens_of_rows()
    found = run(bank.activate(model, each), tokens)
    expected = jnp.stack([alone(model, each[number], tokens[row : row + 1])[0] for row, number in enumerate(ROWS)])
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)
    assert float(jnp.max(jnp.abs(found - model(tokens)))) > 1e-2 * scale


@pytest.mark.parametrize("dispatch", ["ragged", "grouped", "capacity", "reference"])
def test_every_dispatch_takes_a_bank(dispatch):
    model = model_of("layer")
    active = bank.activate(model, [*trained_adapters("skema of other seeds", model), None])
    execution = dataclasses.replace(EXECUTION, dispatch=dispatch, capacity_factor=4.0)
    found = run(dataclasses.replace(active, execution=execution), tokens_of_rows())
    np.testing.assert_allclose(found, run(active, tokens_of_rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "exchange"), [("layer", "all_to_all"), ("pool", "gather")])
def test_eight_devices_run_a_bank_as_one_does(kind, exchange):
    model = model_of(kind)
    active = bank.activate(model, [*trained_adapters("all", model), None])
    mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    execution = dataclasses.replace(EXECUTION, exchange=exchange)
    placed = sharding.shardings(mesh, active.params, records(model.config, active.params))
    split = dataclasses.replace(active, execution=execution, params=jax.device_put(active.params, placed))
    rows, entries = tokens_of_rows()[:4], ROWS[:4]
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params: run(split.with_params(params), rows, entries))(split.params)
    np.testing.assert_allclose(found, run(active, rows, entries), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["layer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dense", "pool"))])
def test_gradients_of_an_entry_are_those_of_its_rows_alone(kind):
    model = model_of(kind)
    tree = bank.stack(trained_adapters("lora", model)[:2] + trained_adapters("lora", model)[:1], model.config)
    tokens = tokens_of_rows()[:3]

    def loss(params, tokens, **batch):
        return jnp.sum(jnp.square(model.with_params(params).apply({"tokens": tokens} | batch).logits_BTV))

    def gradient(key, leaves, *given, **batch):
        flat = {path: leaf for path, leaf in trees.flatten(leaves).items() if path.endswith("/matrix")}
        rest = {path: leaf for path, leaf in trees.flatten(leaves).items() if path not in flat}
        changed = jax.grad(lambda flat: loss(model.params | {key: trees.unflatten(flat | rest)}, *given, **batch))
        return jax.jit(changed)(flat)

    together = gradient(BANK, tree, tokens, adapter=jnp.array([1, 0, 1], jnp.int32))
    for number, rows in ((0, [1]), (1, [0, 2])):
        own = gradient("adapter", bank.entry(tree, number), tokens[np.array(rows)])
        for path, wanted in own.items():
            scale = float(jnp.max(jnp.abs(wanted)))
            assert scale > 0
            np.testing.assert_allclose(jnp.take(together[path], number, -3), wanted, rtol=1e-3, atol=2e-5 * scale)
    assert not any(np.any(jnp.take(leaf, 2, -3)) for leaf in together.values()), "no row has entry 2"


def test_an_entry_of_a_bank_is_its_adapter():
    model = model_of("layer")
    each = trained_adapters("lora", model)
    tree, tokens = bank.stack(each, model.config), tokens_of_rows()
    one = dataclasses.replace(model, params=model.params | {"adapter": bank.entry(tree, 1)})
    np.testing.assert_allclose(one(tokens), alone(model, each[1], tokens), rtol=1e-4, atol=1e-4)


def test_equal_projections_are_held_once():
    model = model_of("layer")
    leaves = trees.flatten(bank.stack(trained_adapters("skema", model), model.config))
    assert leaves["layers/attention/query/in/matrix"].shape == (2, 16, 4)
    assert leaves["layers/experts/up/out/matrix"].shape == (2, 4, 16)
    assert leaves["layers/experts/up/core"].shape == (2, 4, 3, 4, 4)


def test_mistakes_are_one_line():
    model = model_of("dense")
    lora = adapters.init(AdapterConfig(rank=2), model)
    active = bank.activate(model, [lora, None])
    for wrong in (lambda: active(tokens_of_rows()), lambda: run(model, tokens_of_rows())):
        with pytest.raises(UserError, match=r"bank of adapters and batch\['adapter'\]"):
            wrong()
    for again in (adapters.activate, lambda model, adapter: bank.activate(model, [adapter])):
        with pytest.raises(UserError, match="already has an active adapter"):
            again(active, lora)
    with pytest.raises(UserError, match="adapter 1 is a DoRA, which cannot run beside"):
        bank.activate(model, [lora, adapters.init(ADAPTER_METHODS["dora"], model)])
    with pytest.raises(UserError, match="at least one adapter"):
        bank.activate(model, [None])
    with pytest.raises(UserError, match="no active adapter"):
        merging.unmerge(active)
    other = adapters.init(AdapterConfig(rank=2, targets="up"), model_of("layer"))
    with pytest.raises(UserError, match="adapter leaf"):
        bank.activate(model, [lora, other])


@pytest.mark.parametrize(("kind", "platform"), [("dense", "cpu"), ("pool", "tpu")])
def test_decoding_from_a_cache_is_computing_each_row_anew(kind, platform):
    model = unprepared(kind, platform)
    each = [*trained_adapters("lora", model)[:2], None]
    found = generate(ready(bank.activate(model, each)), PROMPTS, GenerateConfig(max_tokens=6), [2, 1, 0])
    models = [model, *(adapters.activate(model, adapter) for adapter in (each[1], each[0]))]
    assert found == [whole_greedy(one, prompt, 6) for one, prompt in zip(models, PROMPTS, strict=True)]
    assert found != generate(model, PROMPTS, GenerateConfig(max_tokens=6))


@pytest.mark.parametrize("kind", ["dense", "layer"])
def test_over_an_int8_base_rows_are_those_of_the_merged_model(kind):
    model, tokens = quantise_int8(model_of(kind)), tokens_of_rows()
    each = trained_adapters("lora", model)
    found = run(bank.activate(model, each), tokens, [0, 1, 2, 1, 0])
    for number, adapter in enumerate(each):
        merged = merging.merge(model, adapter)(tokens)
        rows = np.array([row for row, entry in enumerate([0, 1, 2, 1, 0]) if entry == number])
        np.testing.assert_allclose(found[rows], merged[rows], rtol=0, atol=5e-5 * float(jnp.max(jnp.abs(merged))))
