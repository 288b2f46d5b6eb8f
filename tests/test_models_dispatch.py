"""Every dispatch computes what the plain reference computes, values and gradients, balanced or not."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_weights import experts_of
from jax.sharding import AbstractDevice, AbstractMesh

from moe_reduce.core.config import ExecutionConfig, MoEConfig
from moe_reduce.models.moe import chunks, expert_loop, triton_kernels
from moe_reduce.models.moe.assignments import sort_by_group
from moe_reduce.models.moe.dispatch import DISPATCHES, Assigned
from moe_reduce.models.moe.routing import MANY, route, top_experts

S, D, F, E, A = 96, 16, 24, 5, 2
EXECUTION = ExecutionConfig(block_rows=4, capacity_factor=float(E))


def run(name, x_SD, chosen_SA, weights_SA, pool, execution=EXECUTION):
    """The dispatch of this name; `chunks` is ragged in chunks of 40 rows, of which 192 is no multiple."""
    rows = Assigned(x_SD, chosen_SA, weights_SA)
    if name == "chunks":
        return DISPATCHES["ragged"](rows, *pool, execution, 0.13)
    share = 0.9 if np.any(np.asarray(chosen_SA) >= pool[0].groups) else 1.0
    return DISPATCHES[name](rows, *pool, execution, share)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "MULTIPLE", 8)


def _matrices(key):
    keys = jax.random.split(key, 3)
    return (
        jax.random.normal(keys[0], (E, D, F)),
        jax.random.normal(keys[1], (E, D, F)),
        jax.random.normal(keys[2], (E, F, D)),
    )


@jax.ensure_compile_time_eval()
def _chosen(kind):
    if kind == "random":
        return jax.lax.top_k(jax.random.normal(jax.random.key(3), (S, E)), A)[1].astype(jnp.int32)
    if kind == "one_expert_takes_all":  # two experts in turn, three without a row
        return jnp.broadcast_to(jnp.array([[3, 1]], jnp.int32), (S, A))
    away = jax.lax.top_k(jax.random.normal(jax.random.key(3), (S, E)), A)[1].astype(jnp.int32)
    return jnp.where(away >= 3, E, away)  # some assignments belong to another device


@pytest.mark.parametrize("kind", ["random", "one_expert_takes_all", "some_elsewhere"])
@pytest.mark.parametrize("name", ["blocks", "ragged", "chunks", "grouped", "capacity"])
def test_equals_reference(name, kind):
    check(name, kind)


@pytest.mark.parametrize("name", ["ragged", "chunks"])
def test_rows_past_the_groups_may_hold_anything(name, monkeypatch):
    """TPU's kernel visits tiles that hold rows, and leaves the others as they were, on the way back too."""
    ragged_dot = jax.lax.ragged_dot

    @jax.custom_vjp
    def leaving(rows, matrices, group_sizes):
        return spoilt(ragged_dot(rows, matrices, group_sizes), group_sizes)

    def spoilt(rows, group_sizes):
        return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None], rows, jnp.nan)

    def forward(rows, matrices, group_sizes):
        return leaving(rows, matrices, group_sizes), (rows, matrices, group_sizes)

    def backward(saved, dy):
        rows, matrices, group_sizes = saved
        drows, dmatrices = jax.vjp(lambda *both: ragged_dot(*both, group_sizes), rows, matrices)[1](dy)
        return spoilt(drows, group_sizes), dmatrices, None

    leaving.defvjp(forward, backward)
    monkeypatch.setattr(jax.lax, "ragged_dot", leaving)
    check(name, "some_elsewhere")


@pytest.mark.parametrize("name", ["blocks", "ragged"])
def test_sums_as_on_a_tpu(name, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms["tpu"](*arrays))
    check(name, "random")


def test_chunks_follow_what_is_expected():
    assert chunks.chunk_rows(262_144, 1 / 8) == 49_152
    assert chunks.chunk_rows(1000, 1 / 8) == 192
    assert chunks.chunk_rows(1000, 0.7) == 1000
    assert chunks.chunk_rows(3, 1 / 8) == 3


def check(name, kind):
    x_SD = jax.random.normal(jax.random.key(1), (S, D))
    weights_SA = jax.nn.softmax(jax.random.normal(jax.random.key(2), (S, A)))
    matrices, chosen_SA = _matrices(jax.random.key(0)), _chosen(kind)
    target_SD = jax.random.normal(jax.random.key(4), (S, D))

    def loss(which, x_SD, weights_SA, matrices):
        result = run(which, x_SD, chosen_SA, weights_SA, experts_of(matrices))
        # what the next user of the pool adds to the gradient must come through
        return jnp.sum(result.y_SD * target_SD) + sum(jnp.sum(matrix**2) for matrix in result.masters), result

    def both(which):
        return jax.jit(jax.value_and_grad(lambda *a: loss(which, *a), argnums=(0, 1, 2), has_aux=True))(
            x_SD, weights_SA, matrices
        )

    (_, found), gradients = both(name)
    (_, expected), expected_gradients = both("reference")
    assert found.dropped == 0
    np.testing.assert_allclose(found.y_SD, expected.y_SD, rtol=1e-5, atol=1e-4)
    for size, wanted in zip(found.sizes, expected.sizes, strict=True):
        np.testing.assert_allclose(size, wanted, rtol=1e-5, atol=1e-5)
    for value, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["blocks", "ragged", "chunks", "grouped", "capacity", "reference"])
def test_frozen_experts_leave_the_other_gradients_as_they_are(name):
    x_SD = jax.random.normal(jax.random.key(1), (S, D))
    weights_SA = jax.nn.softmax(jax.random.normal(jax.random.key(2), (S, A)))

    def gradients(which, trained):
        def loss(x_SD, weights_SA, matrices):
            result = run(which, x_SD, _chosen("random"), weights_SA, experts_of(matrices, trained=trained))
            return jnp.sum(result.y_SD * jax.random.normal(jax.random.key(4), (S, D)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x_SD, weights_SA, _matrices(jax.random.key(0)))

    dx, dweights, dpool = gradients(name, trained=False)
    wanted_dx, wanted_dweights, _ = gradients("reference", trained=True)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dweights, wanted_dweights, rtol=1e-4, atol=1e-3)
    assert all(not np.any(matrix) for matrix in dpool)


def _changes(keys):
    """Of gate a LoRA of each expert, of down a core of each between sketches that all share, of up none."""
    normal = jax.random.normal
    return {
        "gate": {"in": {"matrix": normal(keys[0], (E, D, 3))}, "out": {"matrix": normal(keys[1], (E, 3, F))}},
        "down": {
            "in": {"signs": jnp.ones(32), "rows": jnp.array([3, 8, 20, 31], jnp.int32)},
            "core": normal(keys[2], (E, 4, 4)),
            "out": {"matrix": normal(keys[3], (4, D))},
        },
    }


@pytest.mark.parametrize("trained", ["what experts own", "what they share", "all, and the experts", "the scale alone"])
@pytest.mark.parametrize("kind", ["one_expert_takes_all", "some_elsewhere"])
@pytest.mark.parametrize("name", ["blocks", "chunks", "grouped"])
def test_adapters_are_differentiated_as_by_the_reference(name, kind, trained):
    keys = jax.random.split(jax.random.key(5), 8)
    x_SD, target_SD = jax.random.normal(keys[4], (S, D)), jax.random.normal(keys[5], (S, D))
    weights_SA, experts, changes = (
        jax.nn.softmax(jax.random.normal(keys[6], (S, A))),
        _matrices(keys[7]),
        _changes(keys),
    )
    own_down = {"core": changes["down"]["core"]}
    shared_down = {"out": changes["down"]["out"], "scale": jnp.float32(0.7)}
    frees = {
        "what experts own": {"gate": changes["gate"], "down": own_down},
        "what they share": {"down": shared_down},
        "all, and the experts": {"gate": changes["gate"], "down": own_down | shared_down, "experts": experts},
        "the scale alone": {"gate": {"scale": jnp.float32(0.3)}},
    }

    def loss(which, x_SD, weights_SA, free):
        own = {name: {"scale": jnp.float32(0.5)} | change | free.get(name, {}) for name, change in changes.items()}
        pool = experts_of(free.get("experts", experts), trained="experts" in free, deltas=own)
        y_SD = run(which, x_SD, _chosen(kind), weights_SA, pool).y_SD
        return jnp.sum(y_SD * target_SD) / 100, y_SD

    def both(which):
        function = jax.value_and_grad(lambda *a: loss(which, *a), argnums=(0, 1, 2), has_aux=True)
        (_, y_SD), gradients = jax.jit(function)(x_SD, weights_SA, frees[trained])
        return jax.tree.leaves((y_SD, gradients))

    for value, wanted in zip(both(name), both("reference"), strict=True):
        assert np.any(wanted)
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-3)


def _bank(keys):
    """Three entries: of gate LoRAs of each expert; of down cores, with one transform for all and sketches of each."""
    normal = jax.random.normal
    gate = {"in": {"matrix": normal(keys[0], (E, 3, D, 2))}, "out": {"matrix": normal(keys[1], (E, 3, 2, F))}}
    fixed = {"signs": jnp.ones(32), "rows": jnp.array([3, 8, 20, 31], jnp.int32)}
    down = {"in": fixed, "core": normal(keys[2], (E, 3, 4, 4)), "out": {"matrix": normal(keys[3], (3, 4, D))}}
    return {"gate": gate, "down": down}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("blocks", "random"), ("capacity", "random")]
    + [(name, "some_elsewhere") for name in ("blocks", "chunks", "grouped")],
)
def test_banks_are_differentiated_as_by_the_reference(name, kind):
    keys = jax.random.split(jax.random.key(5), 9)
    changes, target_SD = _bank(keys), jax.random.normal(keys[5], (S, D))
    groups_SA = _chosen(kind) * 3 + jnp.broadcast_to(jax.random.randint(keys[8], (S, 1), 0, 3), (S, A))

    def loss(which, x_SD, weights_SA, free):
        fixed = {"gate": {}, "down": {"in": changes["down"]["in"]}}
        own = {name: {"scale": jnp.float32(0.5)} | fixed[name] | free[name] for name in free}
        pool = experts_of(_matrices(keys[7]), trained=False, deltas=own)
        y_SD = run(which, x_SD, groups_SA, weights_SA, pool).y_SD
        return jnp.sum(y_SD * target_SD) / 100, y_SD

    def both(which):
        function = jax.value_and_grad(lambda *a: loss(which, *a), argnums=(0, 1, 2), has_aux=True)
        free = {"gate": changes["gate"], "down": {part: changes["down"][part] for part in ("core", "out")}}
        (_, y_SD), gradients = jax.jit(function)(
            jax.random.normal(keys[4], (S, D)), jax.nn.softmax(jax.random.normal(keys[6], (S, A))), free
        )
        return jax.tree.leaves((y_SD, gradients))

    for value, wanted in zip(both(name), both("reference"), strict=True):
        assert np.any(wanted)
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block_rows", [1, 3, 16, 512])
def test_tiles_of_any_size(block_rows):
    x_SD = jax.random.normal(jax.random.key(1), (S, D))
    weights_SA, chosen_SA = jnp.full((S, A), 0.5), _chosen("random")
    execution = dataclasses.replace(EXECUTION, block_rows=block_rows)
    pool = experts_of(_matrices(jax.random.key(0)))
    y = run("blocks", x_SD, chosen_SA, weights_SA, pool, execution).y_SD
    expected = run("reference", x_SD, chosen_SA, weights_SA, pool, execution).y_SD
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_tiles_are_no_larger_than_what_an_expert_gets():
    assert expert_loop.tile_rows(64, rows=16_384, groups=16) == 64
    assert expert_loop.tile_rows(64, rows=16_384, groups=6144) == 4
    assert expert_loop.tile_rows(64, rows=8, groups=128) == 1
    assert expert_loop.tile_rows(3, rows=100, groups=2) == 3


def test_capacity_reports_what_it_drops():
    chosen_SA = _chosen("one_expert_takes_all")
    execution = dataclasses.replace(EXECUTION, capacity_factor=1.0)
    x_SD, pool = jax.random.normal(jax.random.key(1), (S, D)), experts_of(_matrices(jax.random.key(0)))
    y, _, dropped, *_ = run("capacity", x_SD, chosen_SA, jnp.full((S, A), 0.5), pool, execution)
    capacity = -(-S * A // E)
    assert dropped == 2 * S - 2 * capacity
    assert jnp.all(y[capacity:] == 0)
    assert jnp.all(jnp.any(y[:capacity] != 0, axis=1))


@pytest.mark.parametrize(("assignments", "factor", "capacity"), [(1, 1.0, 1), (4, 1.0, 1), (9, 1.15, 3), (50, 1.1, 11)])
def test_capacity_is_rounded_up_and_never_zero(assignments, factor, capacity):
    """A small share of few rows rounds to 1; floats make 50 · 1.1 more than 55, which must not add a row."""
    share = 0.13 if assignments < 5 else 1.0
    chosen_SA = jnp.zeros((assignments, 1), jnp.int32)
    rows = Assigned(jnp.ones((assignments, D)), chosen_SA, jnp.ones((assignments, 1)))
    execution = dataclasses.replace(EXECUTION, capacity_factor=factor)
    pool = experts_of(_matrices(jax.random.key(0)))
    dropped = DISPATCHES["capacity"](rows, *pool, execution, share).dropped
    assert dropped == assignments - capacity


@pytest.mark.parametrize("name", ["blocks", "ragged", "capacity"])
def test_dora_of_experts_is_refused_and_not_left_out(name):
    delta = {"in": {"matrix": jnp.ones((E, D, 1))}, "out": {"matrix": jnp.ones((E, 1, F))}, "scale": jnp.float32(1)}
    x_SD, weights_SA = jnp.ones((S, D)), jnp.full((S, A), 0.5)
    for more, refused in (({}, False), ({"magnitude": jnp.ones((E, F)), "present": jnp.float32(1)}, True)):
        pool = experts_of(_matrices(jax.random.key(0)), deltas={"gate": delta | more})
        with pytest.raises(AssertionError, match="DoRA") if refused else contextlib.nullcontext():
            run(name, x_SD, _chosen("random"), weights_SA, pool)


def test_sort_is_stable_and_inverse():
    chosen_SA = _chosen("random")
    order = sort_by_group(chosen_SA, E)
    flat = np.asarray(chosen_SA).reshape(-1)
    np.testing.assert_array_equal(order.order_M, np.argsort(flat, stable=True))
    np.testing.assert_array_equal(np.asarray(order.rank_SA).reshape(-1)[np.asarray(order.order_M)], np.arange(S * A))
    np.testing.assert_array_equal(order.counts_J, np.bincount(flat, minlength=E))


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_the_shared_memory_of_small_cards(itemsize):
    dtype = jnp.dtype({2: jnp.bfloat16, 4: jnp.float32}[itemsize])
    for tile, lefts, matrices in (
        (triton_kernels.ONE_MATRIX, 1, 1), (triton_kernels.TWO_MATRICES, 1, 2), (triton_kernels.TWO_LEFTS, 2, 2),
        (triton_kernels.EXTRAS, 1, 1),
        (triton_kernels.ONE_OUTER, 1, 1), (triton_kernels.TWO_OUTERS, 1, 2),
    ):  # fmt: skip
        columns, inner, _, stages = tile.of(dtype)
        assert (lefts * triton_kernels.MOST_ROWS + matrices * columns) * inner * itemsize * stages <= 96 * 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_kernels_are_compiled_for_a_gpu_that_is_not_here(dtype):
    """As far as Triton's own code, where most of what an interpreter lets pass is refused."""
    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    experts = jax.tree.map(lambda leaf: leaf.astype(dtype), tuple(_matrices(jax.random.key(0))))
    x_SD, chosen_SA = jnp.ones((S, D), dtype), _chosen("random")
    order = sort_by_group(chosen_SA, E)

    def step(x_SD, masters, experts):
        groups = triton_kernels.groups_of(order.counts_J, order.order_M.size)

        def layer(x_SD, masters):
            places = triton_kernels.Places(order.order_M // A, order.rank_SA, groups)
            return triton_kernels.swiglu(x_SD, places, experts, masters, False)

        results, vjp = jax.vjp(layer, x_SD, masters)
        rows_MF, product_vjp = jax.vjp(lambda y_MD: triton_kernels.product(y_MD, experts[0], groups, False), results[0])
        return vjp(results), product_vjp(rows_MF)

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = jax.jit(step).trace(x_SD, tuple(_matrices(jax.random.key(0))), experts)
        code = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert code.count("__gpu$xla.gpu.triton") == 9  # two and four of the layer, one and two of a product


def _moe(**changes):
    return dataclasses.replace(MoEConfig(experts=E, active=A, width=F), **changes)


def test_softmax_weights_by_hand():
    logits = jax.random.normal(jax.random.key(0), (S, E)) * 3
    scores = np.asarray(jax.nn.softmax(logits))
    routing = route(logits, None, _moe())
    chosen = np.argsort(-scores, axis=1)[:, :A]
    np.testing.assert_array_equal(routing.experts_SA, chosen)
    picked = np.take_along_axis(scores, chosen, axis=1)
    np.testing.assert_allclose(routing.weights_SA, picked / picked.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(route(logits, None, _moe(normalize=False)).weights_SA, picked, rtol=1e-5)
    np.testing.assert_allclose(routing.probability_E, scores.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(routing.counts_E, np.bincount(chosen.reshape(-1), minlength=E))
    np.testing.assert_allclose(routing.z, np.mean(np.log(np.exp(np.asarray(logits)).sum(1)) ** 2), rtol=1e-5)


def test_sigmoid_weights_survive_underflow():
    logits = jax.random.normal(jax.random.key(0), (S, E)) - 200.0  # σ is 0 in fp32
    weights = route(logits, None, _moe(score_function="sigmoid")).weights_SA
    softmax = route(logits, None, _moe()).weights_SA
    np.testing.assert_allclose(weights, softmax, rtol=1e-4)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_bias_chooses_but_does_not_weigh(score_function):
    moe = _moe(score_function=score_function, normalize=False)
    logits = jax.random.normal(jax.random.key(0), (S, E))
    bias = jnp.array([0.0, 0.0, 0.0, 0.0, 100.0])
    free, biased = route(logits, None, moe), route(logits, bias, moe)
    assert jnp.all(biased.experts_SA[:, 0] == 4)
    score = jax.nn.softmax(logits)[:, 4] if score_function == "softmax" else jax.nn.sigmoid(logits[:, 4])
    np.testing.assert_allclose(biased.weights_SA[:, 0], score, rtol=1e-5)
    assert not jnp.array_equal(free.experts_SA, biased.experts_SA)
    assert jnp.all(jax.grad(lambda b: jnp.sum(route(logits, b, moe).weights_SA))(bias) == 0)


@pytest.mark.parametrize(("experts", "active"), [(MANY, 8), (2072, 8), (6144, 8), (2051, 4), (MANY, 65)])
def test_top_of_many_experts_are_those_of_top_k(experts, active):
    ranking_SE = jax.random.normal(jax.random.key(0), (40, experts))
    found = jax.jit(top_experts, static_argnums=1)(ranking_SE, active)
    np.testing.assert_array_equal(found, jax.lax.top_k(ranking_SE, active)[1])
    tied_SE = jnp.round(ranking_SE)
    np.testing.assert_array_equal(top_experts(tied_SE, active), jax.lax.top_k(tied_SE, active)[1])


@pytest.mark.parametrize("experts", [64, 65])
def test_assignments_are_counted_for_few_experts_and_for_many(experts):
    routing = route(jax.random.normal(jax.random.key(0), (S, experts)), None, _moe(experts=experts))
    counts = np.bincount(np.asarray(routing.experts_SA).reshape(-1), minlength=experts)
    np.testing.assert_array_equal(routing.counts_E, counts)
