"""Scores equal a plain float64 reference that runs every expert on its own tokens; choices and pruning are exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import PoolStage
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reduction import pool as pooling
from moe_reduce.reduction import scores, selection
from moe_reduce.reduction.prune import prune


def _model(config, seed=0, **moe):
    config = dataclasses.replace(config, init_std=0.3, moe=dataclasses.replace(config.moe, **moe))
    return Model(config, init_params(config, jax.random.key(seed)), ExecutionConfig().resolve("cpu"))


def _batches(model, count=3):
    """Rows of which the last has no weight, as a padded batch has."""
    tokens = jax.random.randint(jax.random.key(7), (count, 4, 16), 0, model.config.vocab_size)
    weights = jnp.ones((4, 16)).at[3].set(0.0)
    return [{"tokens": batch, "weights": weights} for batch in tokens]


def _reference(model, batches):
    """(count, Σ g, Σ g‖f‖, Σ ‖f‖, max |f|, max(f, 0)) by layer and expert, in float64, token by token."""
    moe = model.config.moe
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(model.params).items()}
    layers = model.config.layers
    found = np.zeros((6, layers, moe.experts))
    for batch in batches:
        hidden = model.apply({"tokens": batch["tokens"]}, collect=("hidden",)).collected["hidden"]
        inputs = np.asarray(hidden["router_input"], np.float64)[:, :3].reshape(layers, 48, -1)
        for layer in range(layers):
            matrices = [flat[f"layers/experts/{name}"][layer] for name in ("gate", "up", "down")]
            logits = inputs[layer] @ flat["layers/router/weight"][layer]
            for x, z in zip(inputs[layer], logits, strict=True):
                shares = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                chosen = np.argsort(-z, kind="stable")[: moe.active]
                total = shares[chosen].sum() if moe.normalize else 1.0
                for e in chosen:
                    gate, up, down = (matrix[e] for matrix in matrices)
                    hidden = x @ gate
                    f = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
                    norm = np.sqrt(np.sum(f**2))
                    weight = shares[e] / total
                    found[:4, layer, e] += (1, weight, weight * norm, norm)
                    found[4, layer, e] = max(found[4, layer, e], np.abs(f).max())
                    found[5, layer, e] = max(found[5, layer, e], f.max())
    return found


@pytest.mark.parametrize("normalize", [True, False])
def test_every_criterion_equals_the_reference(tiny_layer_moe, normalize):
    model = _model(tiny_layer_moe, experts=96, normalize=normalize)
    batches = _batches(model)
    sums = scores.collect(model, batches)
    count, weight, weighted, norm, maximum, largest = _reference(model, batches)
    tokens = 3 * 3 * 16
    assert sums.tokens == tokens
    np.testing.assert_array_equal(sums.counts, count)
    assert (count == 0).any(), "the test wants an expert that is never routed to"
    with np.errstate(invalid="ignore"):
        wanted = {
            "reap": np.nan_to_num(weighted / count), "reap_total": weighted / tokens, "frequency": count,
            "ean_mean": np.nan_to_num(norm / count), "ean_sum": norm, "weighted_ean_sum": weighted,
            "weighted_expert_frequency_sum": weight, "max_activation": maximum, "max_activations": largest,
            "reap_share": weighted / weighted.sum(axis=1, keepdims=True),
        }  # fmt: skip
    for name, values in wanted.items():
        np.testing.assert_allclose(scores.criterion(name, sums), values, rtol=1e-5, atol=0, err_msg=name)
    assert set(wanted) | {"random"} == set(scores.CRITERIA)
    drawn = scores.criterion("random", sums, seed=1)
    assert np.all((drawn > 0) == (count > 0))
    assert not np.array_equal(drawn, scores.criterion("random", sums, seed=2))


def test_two_passes_agree_bit_for_bit_and_parts_add_up_in_any_order(tiny_layer_moe):
    model = _model(tiny_layer_moe)
    batches = _batches(model, count=5)
    once, again = scores.collect(model, batches), scores.collect(model, batches)
    first, rest = scores.collect(model, batches[:1]), scores.collect(model, batches[1:])
    start, last = scores.collect(model, batches[:3]), scores.collect(model, batches[3:])
    for name in scores.STATISTICS:
        for other in (again, first + rest, last + start):
            np.testing.assert_array_equal(getattr(once, name), getattr(other, name))


def test_a_run_that_drops_tokens_is_scored_without_dropping(tiny_layer_moe):
    model = _model(tiny_layer_moe)
    dropping = dataclasses.replace(model.execution, dispatch="capacity", capacity_factor=0.5)
    batches = _batches(model)
    exact, found = (scores.collect(each, batches) for each in (model, dataclasses.replace(model, execution=dropping)))
    for name in scores.STATISTICS:
        np.testing.assert_array_equal(getattr(found, name), getattr(exact, name))


def test_a_shared_pool_has_one_row_and_its_calls_beside(tiny_shared, tmp_path):
    model = _model(tiny_shared)
    sums = scores.collect(model, _batches(model))
    found = scores.scores(model.config.moe, sums, ["reap", "frequency", "reap_share"])
    assert found.counts.shape == (1, 4)
    shares = np.asarray(sums.weighted_norm, np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.of("reap_share")[0], shares.max(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.counts_by_layer.sum(axis=0), found.counts[0])
    scores.write(found, tmp_path / "scores.json")
    read = scores.read(tmp_path / "scores.json")
    np.testing.assert_array_equal(read.of("reap"), found.of("reap"))
    np.testing.assert_array_equal(read.counts_by_layer, found.counts_by_layer)
    with pytest.raises(UserError, match="ean_sum"):
        read.of("ean_sum")


def test_mistakes_of_scoring(tiny_dense, tiny_layer_moe, tmp_path):
    model = _model(tiny_layer_moe)
    with pytest.raises(UserError, match="raep"):
        scores.criterion("raep", scores.collect(model, _batches(model, 1)))
    with pytest.raises(UserError, match="no tokens"):
        scores.collect(model, [])
    with pytest.raises(UserError, match="dense"):
        scores.collect(dataclasses.replace(model, config=tiny_dense), _batches(model))
    for content in ("", "{}", '{"tokens": 1, "counts": [[1]], "scores": {"reap": [[NaN]]}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json"):
            scores.read(tmp_path / "bad.json")


SCORES = np.array([[5.0, 1.0, 3.0, 3.0], [0.5, 0.4, 0.1, 0.2]])


def test_choice_by_layer_and_overall():
    assert selection.keep_by_row(SCORES, 2) == ((0, 2), (0, 1))  # a tie goes to the lower index
    assert selection.keep_by_row(SCORES, 2, frozenset({(0, 1)})) == ((0, 1), (0, 1))
    # rows count by their own mean: 5/3, 1/3, 1, 1 and 5/3, 4/3, 1/3, 2/3
    assert selection.keep_overall(SCORES, 3, floor=1) == ((0,), (0, 1))
    assert selection.keep_overall(SCORES, 4, floor=2) == ((0, 2), (0, 1))
    assert selection.keep_overall(SCORES, 3, floor=0, protected=frozenset({(1, 2)})) == ((0,), (0, 2))
    assert selection.keep_overall(SCORES[:1] * 10, 2, floor=0) == ((0, 2),)


@pytest.mark.parametrize(("keep", "number"), [(0.5, 4), (1.0, 8), (0.3, 3), (3, 3), (0.1, 1)])
def test_share_or_number(keep, number):
    assert selection.count_of(keep, 8) == number


def test_choices_that_cannot_be():
    for bad in (0, -1, 1.5, float("inf"), float("nan")):
        with pytest.raises(UserError, match="--keep"):
            selection.count_of(bad, 8)
    with pytest.raises(UserError, match="5 experts cannot be kept of 4"):
        selection.keep_by_row(SCORES, 5)
    with pytest.raises(UserError, match="floor"):
        selection.keep_overall(SCORES, 3, floor=2)
    with pytest.raises(UserError, match="protected"):
        selection.keep_by_row(SCORES, 1, frozenset({(0, 1), (0, 2)}))


def test_super_experts_stand_out_or_are_an_error():
    maximum = np.full((8, 64), 1.0)
    maximum[2, 7], maximum[7, 0] = 50.0, 90.0  # the second is in the last quarter of the layers
    home = np.repeat(np.arange(8)[:, None], 64, axis=1)
    assert selection.super_experts(maximum, home, 8) == {(2, 7)}
    assert selection.super_experts(maximum.reshape(1, -1), home.reshape(1, -1), 8) == {(0, 2 * 64 + 7)}
    assert selection.super_experts(maximum.reshape(1, -1), None, 8) == {(0, 2 * 64 + 7), (0, 7 * 64)}
    with pytest.raises(UserError, match="none to protect"):
        selection.super_experts(np.ones((8, 64)), home, 8)


@pytest.mark.parametrize("kind", ["layer", "shared", "pooled"])
def test_keeping_all_is_the_identity(kind, tiny_layer_moe, tiny_shared):
    model = _model(tiny_shared if kind == "shared" else tiny_layer_moe)
    model = pooling.pool(model, PoolStage(canonical=False)) if kind == "pooled" else model
    moe = model.config.moe
    rows = 1 if moe.placement == "shared" else model.config.layers
    kept = prune(model, (tuple(range(moe.experts)),) * rows)
    jax.tree.map(np.testing.assert_array_equal, kept.params, model.params)
    assert kept.config == model.config


def test_pruned_layers_compute_as_if_the_others_could_not_be_chosen(tiny_layer_moe):
    model = _model(tiny_layer_moe, experts=6, selection_bias=True)
    kept = ((0, 2, 5), (1, 2, 3))
    small = prune(model, kept)
    bias = np.full((2, 6), -1e9, np.float32)
    for layer, row in enumerate(kept):
        bias[layer, list(row)] = 0
    hidden = dataclasses.replace(model, params=trees.update(model.params, {"layers/router_bias": jnp.asarray(bias)}))
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, model.config.vocab_size)
    np.testing.assert_allclose(small(tokens), hidden(tokens), rtol=1e-5, atol=1e-5)
    assert small.params["layers"]["experts"]["gate"].shape[:2] == (2, 3)


def test_prunings_that_cannot_be(tiny_layer_moe, tiny_dense):
    model = _model(tiny_layer_moe)
    for kept, part in (
        (((0, 1), (0, 1, 2)), "pool the model first"),
        (((0,), (1,)), "active"),
        (((0, 1),), "1 layers"),
        (((0, 4), (0, 1)), "below 4"),
    ):
        with pytest.raises(UserError, match=part):
            prune(model, kept)
    with pytest.raises(UserError, match="dense"):
        prune(dataclasses.replace(model, config=tiny_dense), ((0,),))


def test_one_ranking_leaves_every_layer_its_floor():
    # a layer whose experts differ much has fewer above the others' mean; all rows have the mean 1
    values = np.array([[3.0, 0.6, 0.3, 0.1], [1.1, 1.1, 0.9, 0.9]])
    assert selection.keep_overall(values, keep=4, floor=1) == ((0,), (0, 1, 2))
    assert selection.keep_overall(values, keep=4, floor=2) == ((0, 1), (0, 1))
    with pytest.raises(UserError, match="does not fit"):
        selection.keep_overall(values, keep=3, floor=2)
