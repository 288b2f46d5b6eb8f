"""Sharding rules are total, meshes fit the machine, and every process feeds the rows that its devices hold."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec
from training_runs import MODELS, ONE_DEVICE

from moe_reduce.adapters import adapter as adapters
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, MeshConfig, TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.parameters import abstract_params, by_path, records
from moe_reduce.training import sharding, steps

CUBE = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def test_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("kind", MODELS)
def test_every_leaf_has_a_rule(kind):
    params = abstract_params(MODELS[kind])
    for mesh in (sharding.make_mesh(CUBE), sharding.make_mesh(ONE_DEVICE)):
        found = trees.flatten(sharding.model_shardings(mesh, MODELS[kind]))
        assert set(found) == set(trees.flatten(params))


def test_experts_are_split_three_ways():
    placed = sharding.model_shardings(sharding.make_mesh(CUBE), MODELS["shared"])
    assert placed["experts"]["gate"].spec == PartitionSpec("expert", "fsdp", "tensor")
    layered = sharding.model_shardings(sharding.make_mesh(CUBE), MODELS["layer"])
    assert layered["layers"]["experts"]["down"].spec == PartitionSpec(None, "expert", "tensor", "fsdp")


def test_unknown_parameter_is_refused():
    mystery = {"layers": {"attention": {"temperature": jnp.ones(2)}}}
    with pytest.raises(UserError, match="layers/attention/temperature"):
        sharding.shardings(sharding.make_mesh(CUBE), mystery, by_path(MODELS["dense"]))


def test_size_that_does_not_divide_is_refused():
    model = dataclasses.replace(MODELS["dense"], vocab_size=385)
    with pytest.raises(UserError, match=r"embedding/table has a size of 385.*tensor"):
        sharding.model_shardings(sharding.make_mesh(CUBE), model)


def test_mesh_takes_what_is_left_and_no_more_than_there_is():
    assert dict(sharding.make_mesh(MeshConfig(expert=2)).shape) == {"data": 4, "fsdp": 1, "expert": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"needs 16 devices and there are 8"):
        sharding.make_mesh(MeshConfig(data=8, fsdp=2))


def test_batch_must_divide():
    with pytest.raises(UserError, match=r"train.batch_size \(12\)"):
        steps.check_batch(sharding.make_mesh(MeshConfig(data=8)), TrainConfig(steps=1, batch_size=12))


def shares(processes, monkeypatch, data, expert=1, tensor=1):
    """process_shard of every process; a device names its process and nothing else matters."""
    each = data * expert * tensor // processes
    devices = np.array([SimpleNamespace(process_index=number // each) for number in range(each * processes)])
    shape = {"data": data, "fsdp": 1, "expert": expert, "tensor": tensor}
    mesh = SimpleNamespace(devices=devices.reshape(tuple(shape.values())), shape=shape)
    found = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(sharding.process_shard(mesh))
    return found


def test_processes_that_hold_the_same_rows_read_the_same_shard(monkeypatch):
    assert shares(data=4, processes=2, monkeypatch=monkeypatch) == [(0, 2), (1, 2)]
    assert shares(data=1, expert=4, processes=2, monkeypatch=monkeypatch) == [(0, 2), (1, 2)]
    assert shares(data=1, tensor=4, processes=2, monkeypatch=monkeypatch) == [(0, 1), (0, 1)]
    assert shares(data=2, tensor=4, processes=4, monkeypatch=monkeypatch) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(UserError, match="does not divide evenly over the 2 hosts"):
        shares(data=3, tensor=2, processes=2, monkeypatch=monkeypatch)


def test_a_process_without_work_is_refused():
    devices = [SimpleNamespace(process_index=process) for process in (0, 0, 1, 1)]
    with pytest.raises(UserError, match="leaves process 1 without work"):
        sharding.make_mesh(MeshConfig(data=2), devices)


def test_what_each_expert_owns_of_an_adapter_lies_with_it():
    """And what experts share, and all of attention, on every device."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    for kind, stacked in (("layer", (None,)), ("shared", ())):
        config = AdapterConfig(method="skema", sketch_width=4, targets="mlp,q", projection="orthonormal")
        leaves = trees.flatten({ADAPTER: adapters.abstract(config, MODELS[kind])})
        places = trees.flatten(
            sharding.shardings(mesh, trees.unflatten(leaves), records(MODELS[kind], trees.unflatten(leaves)))
        )
        split = {path for path, place in places.items() if place.spec != PartitionSpec()}
        assert split == {path for path in leaves if "/experts/" in path and path.endswith("/core")}
        assert {places[path].spec for path in split} == {PartitionSpec(*stacked, "expert")}


def abstract_state(model, transformation):
    """The state of a run with an optimiser of optax's, without its arrays."""
    train = TrainConfig(steps=1, batch_size=8)
    return jax.eval_shape(lambda params: steps.new_state(params, train, transformation), abstract_params(model))


def two_optimizers(path, leaf):
    return "adam" if leaf.ndim < 2 or "embedding" in path else "momentum"


def test_every_leaf_of_a_multi_transform_lies_with_its_parameter():
    """optax masks each part's tree, which then differs from the parameters': such leaves used to be replicated."""
    model = MODELS["dense"]
    labels = trees.map_with_path(two_optimizers, abstract_params(model))
    mixed = optax.multi_transform({"adam": optax.adam(1e-3), "momentum": optax.sgd(1e-2, momentum=0.9)}, labels)
    state = abstract_state(model, optax.chain(optax.clip_by_global_norm(1.0), mixed))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = steps.state_shardings(mesh, state, by_path(model))
    params = trees.flatten(found.params)
    assert sum(place.spec != PartitionSpec() for place in params.values()) > len(params) / 2
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.optimizer), jax.tree.leaves(found.optimizer), strict=True)
    seen = []
    for (keys, leaf), place in pairs:
        if leaf.ndim == 0:
            assert place.spec == PartitionSpec()
            continue
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        (owner,) = [name for name in params if path.endswith(name)]
        assert place == params[owner], path
        seen.append(owner)
    moments = [2 if label == "adam" else 1 for label in trees.flatten(labels).values()]
    assert len(seen) == sum(moments)
    assert set(seen) == set(params)


def test_optimiser_state_that_belongs_to_no_parameter_is_refused():
    def init(_):
        return {"layers": {"attention": {"query": {"preconditioner": jnp.zeros((4, 4))}}}, "count": jnp.zeros(())}

    stray = optax.GradientTransformation(init, lambda updates, state, _=None: (updates, state))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(UserError, match=r"preconditioner.* of shape \[4, 4\] belongs to no parameter"):
        steps.state_shardings(mesh, abstract_state(MODELS["dense"], stray), by_path(MODELS["dense"]))


@pytest.mark.parametrize("nested", [False, True])
def test_constants_of_an_optimiser_are_replicated(nested):
    """Muon keeps its coefficients, which belong to no parameter, beside moments, which do."""
    model = MODELS["dense"]
    optimizer = optax.contrib.muon(1e-3)
    if nested:
        labels = trees.map_with_path(lambda path, _: "adam" if "norm" in path else "muon", abstract_params(model))
        optimizer = optax.multi_transform({"muon": optimizer, "adam": optax.adam(1e-3)}, labels)
    state = abstract_state(model, optimizer)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = steps.state_shardings(mesh, state, by_path(model))
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
    spec = {
        jax.tree_util.keystr(keys): place.spec
        for (keys, leaf), place in zip(leaves, jax.tree.leaves(found.optimizer), strict=True)
        if leaf.ndim
    }
    (coefficients,) = [name for name in spec if name.endswith(".ns_coeffs")]
    assert spec.pop(coefficients) == PartitionSpec()
    params = trees.flatten(found.params)
    for name, place in spec.items():
        (owner,) = [path for path in params if name.endswith("".join(f"['{key}']" for key in path.split("/")))]
        assert place == params[owner].spec, name
    assert len(spec) >= len(params)


@pytest.mark.parametrize("label", ["experts", "constants"])
def test_a_label_that_is_also_a_name_of_parameters_changes_nothing(label):
    """A dict of labels, as of multi_transform, is no tree of parameters."""

    def init(_):
        return {label: optax.contrib.MuonState(jnp.zeros(()), {}, jnp.zeros(3))}

    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    transformation = optax.GradientTransformation(init, lambda updates, state, _=None: (updates, state))
    state = abstract_state(MODELS["shared"], transformation)
    found = steps.state_shardings(mesh, state, by_path(MODELS["shared"]))
    assert {place.spec for place in jax.tree.leaves(found.optimizer)} == {PartitionSpec()}


def test_state_below_a_parameter_is_refused():
    """A preconditioner in a tuple in the place of a parameter is not a constant of the optimiser."""

    def init(params):
        return jax.tree.map(lambda _: (jnp.zeros(3),), params)

    stray = optax.GradientTransformation(init, lambda updates, state, _=None: (updates, state))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(UserError, match=r"of shape \[3\] belongs to no parameter"):
        steps.state_shardings(mesh, abstract_state(MODELS["dense"], stray), by_path(MODELS["dense"]))
