"""Tokens exchanged between devices give what one device gives: outputs, gradients, sizes, and when all go to one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_weights import experts_of

from moe_reduce.core.config import ExecutionConfig, MeshConfig
from moe_reduce.models.moe import chunks, exchange
from moe_reduce.models.moe.dispatch import Assigned
from moe_reduce.models.moe.mixture import apply_experts
from moe_reduce.training import sharding

B, T, D, F, E, A = 8, 6, 8, 16, 8, 3
MESHES = {"two": {"data": 4, "expert": 2}, "eight": {"expert": 8}, "cube": {"fsdp": 2, "expert": 2, "tensor": 2}}
WAYS = ("gather", "all_to_all", "ragged")


def inputs(chosen):
    key = jax.random.split(jax.random.key(0), 6)
    matrices = (
        jax.random.normal(key[0], (E, D, F)), jax.random.normal(key[1], (E, D, F)), jax.random.normal(key[2], (E, F, D))
    )  # fmt: skip
    x_BTD = jax.random.normal(key[3], (B, T, D))
    if chosen == "spread":
        chosen_BTA = jnp.argsort(jax.random.uniform(key[4], (B, T, E)))[:, :, :A].astype(jnp.int32)
    else:  # the first A experts, which the first devices hold
        chosen_BTA = jnp.broadcast_to(jnp.arange(A, dtype=jnp.int32), (B, T, A))
    return x_BTD, chosen_BTA, jax.random.uniform(key[5], (B, T, A)), matrices


def compute(execution, x_BTD, chosen_BTA, weights_BTA, matrices):
    """Everything that a call gives, and the gradients of a sum of squares."""

    def loss(x_BTD, weights_BTA, matrices):
        rows = Assigned(x_BTD, chosen_BTA, weights_BTA)
        y_BTD, _, dropped, sizes = apply_experts(rows, *experts_of(matrices), execution)
        return jnp.sum(jnp.square(y_BTD)), (y_BTD, dropped, *sizes)

    (_, outputs), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x_BTD, weights_BTA, matrices)
    return outputs, gradients


def emulated_exchange(rows, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """jax.lax.ragged_all_to_all as its documentation has it, which XLA's CPU backend does not know."""
    here = jax.lax.axis_index(axis_name)
    every = partial(jax.lax.all_gather, axis_name=axis_name)
    rows_PMI, starts_PP, sizes_PP, places_PP = map(every, (rows, input_offsets, send_sizes, output_offsets))
    for source in range(rows_PMI.shape[0]):
        number = jnp.arange(rows.shape[0])
        # each sender says how much it sends, and where it is to lie
        start, size, place = (table[source, here] for table in (starts_PP, sizes_PP, places_PP))
        inside = (number >= start) & (number < start + size)
        target = jnp.where(inside, number - start + place, output.shape[0])
        output = output.at[target].set(rows_PMI[source], mode="drop")
        # and the receiver how much it takes
        output = jnp.where(recv_sizes[source] == size, output, jnp.nan if output.dtype == jnp.float32 else -1)
    return output


@pytest.fixture
def way(request, monkeypatch):
    """The settings of a way to exchange; `ragged` is that of accelerators, on an emulated primitive."""
    if request.param != "ragged":
        return {"exchange": request.param, "platform": "cpu"}
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_exchange)
    return {"exchange": "all_to_all", "platform": "tpu"}


@pytest.mark.parametrize("chosen", ["spread", "crowded"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_mesh_gives_what_one_device_gives(way, mesh, chosen):
    check(way, MESHES[mesh], chosen, "blocks")


@pytest.mark.parametrize("dispatch", ["ragged", "grouped", "reference", "capacity"])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_every_dispatch_behind_every_exchange(way, dispatch):
    check(way, MESHES["two"], "spread", dispatch)


@pytest.mark.parametrize("chosen", ["spread", "crowded"])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_rows_in_chunks(way, chosen, monkeypatch):
    """An eighth of 144 assignments is expected on each device; a third comes to each of three when it is crowded."""
    monkeypatch.setattr(chunks, "MULTIPLE", 4)
    taken = []
    in_chunks = chunks.in_chunks
    monkeypatch.setattr(chunks, "in_chunks", lambda *arguments: taken.append(arguments[1]) or in_chunks(*arguments))
    check(way, MESHES["eight"], chosen, "ragged")
    assert taken == [28]


def check(way, mesh, chosen, dispatch):
    arrays = inputs(chosen)
    execution = ExecutionConfig(dispatch=dispatch, block_rows=4, capacity_factor=float(E), **way)
    expected = compute(ExecutionConfig(dispatch="reference"), *arrays)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**mesh))):
        found = jax.jit(partial(compute, execution))(*arrays)
    if "tensor" in mesh:  # sizes are of slices there
        found, expected = ((outputs[:2], gradients) for outputs, gradients in (found, expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, expected)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_capacity_is_of_the_mean_over_all_devices(way):
    execution = ExecutionConfig(dispatch="capacity", capacity_factor=1.0, **way)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**MESHES["two"]))):
        spread = jax.jit(partial(compute, execution))(*inputs("spread"))
        crowded = jax.jit(partial(compute, execution))(*inputs("crowded"))
    assert 0 < spread[0][1] < 0.4
    # three experts of eight, all on one device of two, have places for three eighths of what they are asked for
    np.testing.assert_allclose(crowded[0][1], 1 - 3 / 8, atol=0.05)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_assignments_to_no_expert_get_nothing(way):
    """Padding calls no expert: neither its output nor its norm may be another row's."""
    x_BTD, chosen_BTA, weights_BTA, matrices = inputs("spread")
    chosen_BTA = chosen_BTA.at[:, -2:].set(E)
    execution = ExecutionConfig(dispatch="capacity", capacity_factor=float(E), **way)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(**MESHES["two"]))):
        outputs, gradients = jax.jit(partial(compute, execution))(x_BTD, chosen_BTA, weights_BTA, matrices)
    expected = compute(ExecutionConfig(dispatch="reference"), x_BTD, chosen_BTA, weights_BTA, matrices)
    y_BTD, _, *sizes = outputs
    for padded in (y_BTD, *sizes):
        assert not np.any(padded[:, -2:])
        assert np.all(np.any(padded[:, :-2], axis=-1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), (outputs, gradients), expected)


def test_auto_sends_less(monkeypatch):
    taken = []
    for name in ("_gather", "_all_to_all"):
        monkeypatch.setattr(exchange, name, lambda *_, name=name: taken.append(name))
    rows = Assigned(jnp.zeros((4, D)), jnp.zeros((4, A), jnp.int32), jnp.zeros((4, A)))
    for devices, platform in ((2, "tpu"), (A, "tpu"), (A + 1, "tpu"), (A + 1, "cpu")):
        monkeypatch.setattr(jax.lax, "axis_size", lambda _, devices=devices: devices)
        exchange.exchange(rows, None, (), ExecutionConfig(platform=platform))
    assert taken == ["_gather", "_gather", "_all_to_all", "_gather"]
