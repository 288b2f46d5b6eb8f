"""Heads, layers, embeddings, weights and neurons: identities, what is left, and the commands."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.errors import UserError
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import abstract_params
from moe_reduce.reduction.embedding import factorise_embedding
from moe_reduce.reduction.heads import group_heads
from moe_reduce.reduction.layers import block_influence, drop_layers
from moe_reduce.reduction.neurons import prune_neurons
from moe_reduce.reduction.sparsity import prune_magnitude, prune_two_four
from moe_reduce.storage import manifest

FEED_FORWARD = r"(layers/)?(mlp|experts)/(gate|up|down)"
KINDS = ["tiny_dense", "tiny_neox", "tiny_shared", "tiny_layer_moe"]


@pytest.fixture(params=KINDS)
def config(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def model(config):
    return made(config)


@pytest.fixture
def dense(tiny_dense):
    return made(tiny_dense)


@functools.cache
def made(config):
    """Jax arrays cannot be changed, so tests may share them. Biases are drawn, since they start from zero."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    biases = {path: leaf for path, leaf in trees.flatten(params).items() if path.endswith("bias")}
    drawn = [0.3 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(biases.values())]
    params = trees.update(params, dict(zip(biases, drawn, strict=True)))
    return Model(config, params, ExecutionConfig().resolve("cpu"))


def tokens(model, batch=2, time=12):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, time))


def batch_of(ids, counted=None):
    weights = np.ones(ids.shape, np.float32) if counted is None else counted.astype(np.float32)
    return {"tokens": ids.astype(np.int32), "targets": ids.astype(np.int32), "weights": weights}


def assert_same(left, right):
    """Every leaf bit for bit, and its dtype."""
    left, right = trees.flatten(left), trees.flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[path]), err_msg=path, strict=True)


def changed_paths(before, after):
    left, right = trees.flatten(before.params), trees.flatten(after.params)
    return {path for path in left if not np.array_equal(left[path], right[path])}


def matrices(params):
    """Path -> [M, I, O]; written apart from the subject, by the names of the leaves."""
    found = {}
    for path, leaf in trees.flatten(params).items():
        name, leaf = path.split("/")[-1], np.asarray(leaf)
        if name in ("query", "key", "value"):
            found[path] = leaf.reshape(leaf.shape[0], leaf.shape[1], -1)
        elif name == "output":
            found[path] = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])
        elif name in ("gate", "up", "down"):
            found[path] = leaf.reshape(-1, *leaf.shape[-2:])
    assert len(found) == (7 if any(path.endswith("/gate") for path in found) else 6)
    return found


def with_heads_repeated(model, times):
    """The model with each key/value head in `times` copies side by side; it computes the same."""
    expect = 4 if model.config.biases else 2
    found = trees.select(model.params, "layers/attention/(key|value)(_bias)?", expect=expect)
    leaves = {path: jnp.repeat(leaf, times, axis=-2) for path, leaf in found.items()}
    config = dataclasses.replace(model.config, key_value_heads=model.config.key_value_heads * times)
    return dataclasses.replace(model, config=config, params=trees.update(model.params, leaves))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_grouping_repeated_heads_is_exact(config, times):
    few = made(dataclasses.replace(config, query_heads=12, key_value_heads=2))
    many = with_heads_repeated(few, times)
    grouped = group_heads(many, few.config.key_value_heads)
    assert grouped.config == few.config
    assert_same(grouped.params, few.params)
    np.testing.assert_allclose(grouped(tokens(few)), many(tokens(few)), atol=1e-5)


def test_grouped_heads_are_means_of_neighbours(tiny_dense):
    model = made(dataclasses.replace(tiny_dense, key_value_heads=4))
    grouped = group_heads(model, 2)
    for name in ("key", "value"):
        before, after = (np.asarray(x.params["layers"]["attention"][name]) for x in (model, grouped))
        np.testing.assert_allclose(after[:, :, 1], (before[:, :, 2] + before[:, :, 3]) / 2, atol=1e-7)
    assert changed_paths(model, grouped) == {"layers/attention/key", "layers/attention/value"}


def test_dropped_layer_equals_a_model_without_it(config):
    deep = made(dataclasses.replace(config, layers=4))
    dropped = drop_layers(deep, [2, 0])
    assert dropped.config == dataclasses.replace(config, layers=2)
    below = jax.tree.map(lambda leaf: leaf[jnp.array([1, 3])], deep.params["layers"])
    assert_same(dropped.params, deep.params | {"layers": below})
    assert_same(drop_layers(deep, []).params, deep.params)


def by_hand_influence(model, ids, counted):
    """From the inputs of the blocks alone, a spare one behind the last."""
    below = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), model.params["layers"])
    longer = dataclasses.replace(model.config, layers=model.config.layers + 1)
    params = model.params | {"layers": below}
    hidden = Model(longer, params, model.execution).apply({"tokens": ids}, collect=("hidden",)).collected["hidden"]
    streams = np.asarray(hidden["block_input"])
    found = []
    for before, after in itertools.pairwise(streams):
        cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
        found.append(1 - cosine[counted].mean())
    return np.array(found)


def test_block_influence_equals_by_hand(config):
    deep = made(dataclasses.replace(config, layers=3, init_std=0.3))
    ids = tokens(deep, batch=4)
    counted = np.ones(ids.shape, bool)
    counted[:, -1], counted[3] = False, False
    influence = block_influence(deep, [batch_of(ids[:2], counted[:2]), batch_of(ids[2:], counted[2:])])
    np.testing.assert_allclose(influence, by_hand_influence(deep, ids, counted), atol=1e-5)
    assert influence.min() > 1e-3
    assert np.ptp(influence) > 1e-4


def test_a_silent_layer_has_no_influence_and_is_no_loss(dense):
    params = dense.params
    for path in ("layers/attention/output", "layers/mlp/down"):
        params = trees.update(params, {path: trees.flatten(params)[path].at[1].set(0)})
    silent = dataclasses.replace(dense, params=params)
    influence = block_influence(silent, [batch_of(tokens(dense))])
    assert abs(influence[1]) < 1e-6 < influence[0]
    np.testing.assert_allclose(drop_layers(silent, [1])(tokens(dense)), silent(tokens(dense)), atol=1e-5)


@pytest.mark.parametrize("inner", [16, 11])
def test_factorised_embedding_at_the_rank_computes_the_same(dense, inner):
    table = dense.params["embedding"]["table"]
    if inner < 16:  # of that rank
        table = table[:, :inner] @ table[:inner]
    model = dataclasses.replace(dense, params=trees.update(dense.params, {"embedding/table": table}))
    factorised = factorise_embedding(model, inner)
    factor, projection = (factorised.params["embedding"][name] for name in ("factor", "projection"))
    assert (factor.shape, projection.shape) == ((64, inner), (inner, 16))
    np.testing.assert_allclose(factor @ projection, table, atol=1e-6 * float(jnp.abs(table).max()) * 10)
    scale = np.abs(model(tokens(model))).max()
    np.testing.assert_allclose(factorised(tokens(model)), model(tokens(model)), atol=1e-5 * scale)


def test_factorised_embedding_is_the_best_of_its_rank(dense):
    table = np.asarray(dense.params["embedding"]["table"])
    factorised = factorise_embedding(dense, 5)
    factors = factorised.params["embedding"]
    lost = np.linalg.norm(table - np.asarray(factors["factor"] @ factors["projection"]))
    singular = np.linalg.svd(table, compute_uv=False)
    assert math.isclose(lost, np.linalg.norm(singular[5:]), rel_tol=1e-4)
    # the projection keeps lengths on average, as a fresh one does
    assert math.isclose(np.sqrt(np.mean(np.square(factors["projection"]))), 5**-0.5, rel_tol=1e-4)
    assert {path for path in trees.flatten(dense.params) if path not in trees.flatten(factorised.params)} == {
        "embedding/table"
    }


@pytest.mark.parametrize("share", [0.0, 0.29])
def test_magnitude_zeroes_exactly_the_smallest(model, share):
    sparse = prune_magnitude(model, share)
    before, after = matrices(model.params), matrices(sparse.params)
    for path, w_MIO in before.items():
        for old, new in zip(w_MIO, after[path], strict=True):
            zeroed = new == 0
            assert zeroed.sum() == round(share * 100) * old.size // 100, path
            np.testing.assert_array_equal(new[~zeroed], old[~zeroed])
            if share:
                assert np.abs(old[zeroed]).max() <= np.abs(old[~zeroed]).min(), path
    assert changed_paths(model, sparse) == (set(before) if share else set())


def test_magnitude_breaks_ties_by_position(dense):
    ones = {path: jnp.ones_like(leaf) for path, leaf in trees.flatten(dense.params).items() if "attention/key" in path}
    equal = dataclasses.replace(dense, params=trees.update(dense.params, ones))
    key = matrices(prune_magnitude(equal, 0.25).params)["layers/attention/key"].reshape(2, -1)
    assert not key[:, :32].any()
    assert key[:, 32:].all()


def test_share_is_the_number_that_was_written(tiny_dense):
    config = dataclasses.replace(tiny_dense, width=10, feed_forward_width=10, query_heads=1, key_value_heads=1)
    gates = matrices(prune_magnitude(made(config), 0.29).params)["layers/mlp/gate"]
    assert [(gate == 0).sum() for gate in gates] == [29, 29]  # 0.29 · 100 is 28.999999999999996


def test_two_four_holds_everywhere(model):
    sparse = prune_two_four(model)
    before, after = matrices(model.params), matrices(sparse.params)
    for path, w_MIO in before.items():
        old, new = (x.reshape(x.shape[0], -1, 4, x.shape[2]) for x in (w_MIO, after[path]))
        assert ((new != 0).sum(axis=2) == 2).all(), path
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
        largest = np.sort(np.abs(old), axis=2)[:, :, 2:]
        np.testing.assert_array_equal(np.sort(np.abs(new), axis=2)[:, :, 2:], largest)
    assert changed_paths(model, sparse) == set(before)
    assert_same(prune_two_four(sparse).params, sparse.params)


def test_two_four_of_ties_leaves_two(dense):
    ones = {path: jnp.ones_like(leaf) for path, leaf in trees.flatten(dense.params).items() if "mlp/up" in path}
    equal = dataclasses.replace(dense, params=trees.update(dense.params, ones))
    up = matrices(prune_two_four(equal).params)["layers/mlp/up"].reshape(2, 4, 4, 32)
    assert ((up != 0).sum(axis=2) == 2).all()


def feed_forward_width(config):
    return config.feed_forward_width if config.moe is None else config.moe.width


def test_keeping_all_neurons_is_the_identity(model):
    kept = prune_neurons(model, feed_forward_width(model.config))
    assert kept.config == model.config
    assert_same(kept.params, model.params)


def test_neurons_that_write_nothing_are_removed_first(model):
    """Three of each block, others in each layer and expert."""
    paths = trees.select(model.params, FEED_FORWARD, expect=2 if model.config.biases else 3)
    (down_path,) = [path for path in paths if path.endswith("down")]
    down, random = np.array(paths[down_path]), np.random.default_rng(0)
    width = feed_forward_width(model.config)
    for index in np.ndindex(down.shape[:-2]):
        down[index][random.choice(width, 3, replace=False)] = 0
    silent = dataclasses.replace(model, params=trees.update(model.params, {down_path: jnp.asarray(down)}))
    pruned = prune_neurons(silent, width - 3)
    assert feed_forward_width(pruned.config) == width - 3
    assert pruned.params.keys() == model.params.keys()
    np.testing.assert_allclose(pruned(tokens(model)), silent(tokens(model)), atol=1e-5)
    smaller = trees.flatten(pruned.params)[down_path]
    assert np.asarray(smaller).any(axis=-1).all()


def test_neurons_are_chosen_by_the_product_of_their_norms(dense):
    pruned = prune_neurons(dense, 5).params["layers"]["mlp"]
    for layer in range(2):
        gate, up, down = (np.asarray(dense.params["layers"]["mlp"][name][layer]) for name in ("gate", "up", "down"))
        size = np.linalg.norm(gate, axis=0) * np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1)
        kept = np.sort(np.argsort(size)[-5:])
        np.testing.assert_array_equal(pruned["gate"][layer], gate[:, kept])
        np.testing.assert_array_equal(pruned["up"][layer], up[:, kept])
        np.testing.assert_array_equal(pruned["down"][layer], down[kept])


def test_biases_of_neurons_count_and_go_with_them(tiny_neox):
    model = made(tiny_neox)
    pruned = prune_neurons(model, 5).params["layers"]["mlp"]
    before = {name: np.asarray(leaf) for name, leaf in model.params["layers"]["mlp"].items()}
    for layer in range(2):
        up, up_bias, down = (before[name][layer] for name in ("up", "up_bias", "down"))
        size = np.sqrt((up**2).sum(axis=0) + up_bias**2) * np.linalg.norm(down, axis=1)
        kept = np.sort(np.argsort(size)[-5:])
        np.testing.assert_array_equal(pruned["up"][layer], up[:, kept])
        np.testing.assert_array_equal(pruned["up_bias"][layer], up_bias[kept])
        np.testing.assert_array_equal(pruned["down"][layer], down[kept])
    np.testing.assert_array_equal(pruned["down_bias"], before["down_bias"])


def test_grouped_neox_is_ours_and_one_with_all_its_heads_is_theirs(tiny_neox, tmp_path):
    model = made(tiny_neox)
    for heads, kind in ((4, "gpt_neox"), (2, "moe_reduce")):
        grouped = group_heads(model, heads)
        moe_reduce.save(grouped, tmp_path / kind)
        assert json.loads((tmp_path / kind / "config.json").read_text())["model_type"] == kind
        np.testing.assert_array_equal(moe_reduce.load(tmp_path / kind)(tokens(model)), grouped(tokens(model)))


TRANSFORMS = {
    "group_heads": lambda model: group_heads(model, 1),
    "drop_layers": lambda model: drop_layers(model, [0]),
    "factorise_embedding": lambda model: factorise_embedding(model, 4),
    "prune_neurons": lambda model: prune_neurons(model, 7),
    "prune_magnitude": lambda model: prune_magnitude(model, 0.5),
    "prune_two_four": prune_two_four,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_abstract_models_pass_and_dtypes_stay(request, kind, name):
    """Only shapes in, only shapes out, and those are the ones that the new configuration calls for."""
    config = request.getfixturevalue(kind)
    if name == "factorise_embedding":
        config = dataclasses.replace(config, tied_embeddings=True, embedding_factor=None)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract_params(config))
    model = Model(config, half, ExecutionConfig().resolve("cpu"))
    after = TRANSFORMS[name](model)
    leaves, expected = trees.flatten(after.params), trees.flatten(abstract_params(after.config))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: leaf.shape for path, leaf in expected.items()}
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
    assert trees.flatten(model.params).keys() == trees.flatten(abstract_params(config)).keys()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_real_models_agree_with_their_plan(dense, name):
    before = jax.tree.map(np.asarray, dense.params)
    after = TRANSFORMS[name](dense)
    assert_same(dense.params, before)
    planned = TRANSFORMS[name](dataclasses.replace(dense, params=abstract_params(dense.config)))
    assert after.config == planned.config
    assert trees.size(after.params) == trees.size(planned.params)
    assert np.isfinite(after(tokens(dense))).all()


@pytest.mark.parametrize(
    ("transform", "culprit"),
    [
        (lambda model: group_heads(model, 3), "key_value_heads=3"),
        (lambda model: group_heads(model, 0), "key_value_heads=0"),
        (lambda model: drop_layers(model, [2]), "0..1"),
        (lambda model: drop_layers(model, [1, 1]), "twice"),
        (lambda model: drop_layers(model, [1, 0]), "at least one"),
        (lambda model: factorise_embedding(model, 17), "inner=17"),
        (lambda model: factorise_embedding(model, 0), "inner=0"),
        (lambda model: factorise_embedding(factorise_embedding(model, 4), 4), "factorised already"),
        (lambda model: prune_magnitude(model, 1.0), "share=1.0"),
        (lambda model: prune_magnitude(model, -0.1), "share=-0.1"),
        (lambda model: prune_magnitude(model, math.nan), "share=nan"),
        (lambda model: prune_two_four(prune_neurons(model, 30)), "layers/mlp/down"),
        (lambda model: prune_neurons(model, 0), "keep=0"),
        (lambda model: prune_neurons(model, 33), "keep=33"),
        (lambda model: block_influence(model, []), "Block Influence"),
    ],
)
def test_mistakes_name_the_key(dense, transform, culprit):
    with pytest.raises(UserError, match=culprit) as raised:
        transform(dense)
    assert "\n" not in str(raised.value)
    assert ": " in str(raised.value)  # a remedy follows


def test_untied_embeddings_are_not_factorised(tiny_layer_moe):
    with pytest.raises(UserError, match="tied_embeddings"):
        factorise_embedding(made(tiny_layer_moe), 4)


@pytest.fixture
def directory(tiny_dense, tmp_path):
    moe_reduce.save(made(dataclasses.replace(tiny_dense, layers=3, init_std=0.3)), tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, (5, 16)).astype(np.int32))
    return tmp_path


def command(directory, name, *arguments):
    return [name, f"--model={directory / 'model'}", f"--out={directory / 'out'}", *arguments]


def data(directory):
    return [f"--data={directory / 'tokens.npy'}", "--sequence-length=16", "--batch-size=4"]


COMMANDS = {
    "group-heads": (["--key-value-heads=1"], lambda model: group_heads(model, 1), {"key_value_heads": 1}),
    "drop-layers": (["--layers=2,0"], lambda model: drop_layers(model, [2, 0]), {"layers": [2, 0]}),
    "factorise-embedding": (["--inner=5"], lambda model: factorise_embedding(model, 5), {"inner": 5}),
    "prune-neurons": (["--keep=9"], lambda model: prune_neurons(model, 9), {"keep": 9}),
    "sparsify": (["--pattern=2:4"], prune_two_four, {"share": None, "pattern": "2:4"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_writes_what_the_function_makes(directory, name, capsys):
    arguments, transform, settings = COMMANDS[name]
    assert main(command(directory, name, *arguments)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(directory / "out")
    before, after = moe_reduce.load(directory / "model"), moe_reduce.load(directory / "out")
    expected = transform(before)
    assert after.config == expected.config
    assert_same(after.params, expected.params)
    (step,) = after.chain
    assert step.command == name
    assert settings.items() <= step.arguments.items()
    assert step.inputs == (manifest.input_of(directory / "model"),)
    sizes = trees.size(before.params), trees.size(expected.params)
    assert (step.parameters_before, step.parameters_after) == sizes
    assert f"parameters: {sizes[0]:,} -> {sizes[1]:,}" in out
    assert manifest.verify(directory / "out") == []


def test_command_measures_the_loss(directory, capsys):
    arguments = command(directory, "sparsify", "--share=0.5", *data(directory))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    losses = []
    for place in ("model", "out"):
        summary = directory / f"evaluation-{place}"
        assert main(["evaluate", f"--model={directory / place}", f"--out={summary}", *data(directory)]) == 0
        losses.append(json.loads((summary / "summary.json").read_text())["loss"])
    assert f"loss: {losses[0]:.4f} -> {losses[1]:.4f}" in out
    (step,) = moe_reduce.load(directory / "out").chain
    assert (step.quality["loss_before"], step.quality["loss"]) == tuple(losses)
    assert step.arguments["data"] == str(directory / "tokens.npy")
    matrix_weights = sum(w_MIO.size for w_MIO in matrices(moe_reduce.load(directory / "out").params).values())
    assert step.arguments["zeros"] == matrix_weights // 2
    assert f"zeros: 0 -> {matrix_weights // 2:,}" in out


def test_command_drops_the_least_influential(directory, capsys):
    assert main(command(directory, "drop-layers", "--count=2", "--max-batches=1", *data(directory))) == 0
    model = moe_reduce.load(directory / "model")
    ids = np.load(directory / "tokens.npy")[:4]  # every token counts
    influence = block_influence(model, [batch_of(ids, np.ones(ids.shape, bool))])
    dropped = sorted(np.argsort(influence)[:2].tolist())
    after = moe_reduce.load(directory / "out")
    assert after.chain[0].arguments["layers"] == dropped
    np.testing.assert_allclose(after.chain[0].arguments["block_influence"], influence, atol=1e-5)
    assert_same(after.params, drop_layers(model, dropped).params)
    assert "block_influence" in capsys.readouterr().out


def test_command_says_which_experts_are_left(tiny_layer_moe, tiny_shared, tmp_path):
    """Of a second run the originals are still those of the first model; a shared pool loses none."""
    moe_reduce.save(made(dataclasses.replace(tiny_layer_moe, layers=4)), tmp_path / "4")
    for before, after, layers in (("4", "3", "1"), ("3", "1", "0,1")):
        assert (
            main(["drop-layers", f"--model={tmp_path / before}", f"--out={tmp_path / after}", f"--layers={layers}"])
            == 0
        )
    first, second = moe_reduce.load(tmp_path / "1").chain
    assert first.kept_experts == [[[layer, index] for index in range(4)] for layer in (0, 2, 3)]
    assert second.kept_experts == [[[3, index] for index in range(4)]]
    moe_reduce.save(made(tiny_shared), tmp_path / "shared")
    assert main(["drop-layers", f"--model={tmp_path / 'shared'}", f"--out={tmp_path / 'out'}", "--layers=0"]) == 0
    assert moe_reduce.load(tmp_path / "out").chain[0].kept_experts is None


def test_command_overwrites_only_when_told(directory, capsys):
    arguments = command(directory, "prune-neurons", "--keep=9")
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command(directory, "prune-neurons", "--keep=8"), "--overwrite"]) == 0
    assert moe_reduce.load(directory / "out").config.feed_forward_width == 8
    # an input is never replaced; a chain grows
    again = ["group-heads", f"--model={directory / 'out'}", "--key-value-heads=1", "--overwrite"]
    capsys.readouterr()
    assert main([*again, f"--out={directory / 'out'}"]) == 2
    assert "which this command reads" in capsys.readouterr().err
    assert main([*again, f"--out={directory / 'grouped'}"]) == 0
    assert [step.command for step in moe_reduce.load(directory / "grouped").chain] == ["prune-neurons", "group-heads"]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["group-heads", "--key-value-heads=3"], "key_value_heads=3"),
        (["group-heads"], "--key-value-heads"),
        (["drop-layers", "--count=1"], "--data"),
        (["drop-layers", "--count=3", "--data=x.npy"], "--count=3"),
        (["drop-layers", "--layers=1,b"], "--layers"),
        (["drop-layers"], "--layers"),
        (["factorise-embedding", "--inner=99"], "inner=99"),
        (["sparsify"], "--share"),
        (["sparsify", "--pattern=1:4"], "--pattern"),
        (["sparsify", "--share=2"], "share=2"),
        (["prune-neurons", "--keep=0"], "keep=0"),
        (["prune-neurons", "--keep=3", "--data=x.npy", "--batch-size=0"], "--batch-size"),
        (["prune-neurons", "--keep=3", "--kept=4"], "--kept=4"),
        (["prune-neurons", "--keep=3", "--data="], "data.source"),
    ],
)
def test_command_mistakes_are_one_line(directory, arguments, culprit, capsys):
    assert main(command(directory, *arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert culprit in line
    assert not (directory / "out").exists()
