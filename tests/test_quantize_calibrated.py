"""The command `quantize` with text: files hold what memory gives, experts are named, and mistakes are one line."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from training_runs import MODELS, initial_params, token_data

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.core.schemes import parse
from moe_reduce.data.batches import WholeSplit
from moe_reduce.data.prepare import prepare
from moe_reduce.data.rows import every_token
from moe_reduce.models.model import Model
from moe_reduce.models.weights import is_quantised
from moe_reduce.quantization import calibrated, streamed
from moe_reduce.quantization.round_to_nearest import every_component, schemes_by_path
from moe_reduce.storage import manifest

INT4 = parse("int4-channel")


def saved(kind, directory):
    generator = np.random.default_rng(0)
    params = trees.map_with_path(
        lambda _, leaf: leaf * (12 if leaf.ndim > 2 else 1) + generator.normal(0, 0.05, leaf.shape).astype(np.float32),
        initial_params(MODELS[kind]),
    )
    moe_reduce.save(Model(MODELS[kind], params, ExecutionConfig()), directory / "model")
    return token_data(directory, rows=4)


def run(directory, *options):
    words = ["quantize", f"--model={directory / 'model'}", f"--out={directory / 'out'}", "--scheme=int4-channel"]
    return main([*words, "--overwrite", "--batch-size=4", f"--cache={directory}", *options])


@pytest.mark.parametrize(("kind", "method"), [("layer", "gptq"), ("layer", "awq"), ("neox", "awq"), ("pool", "gptq")])
def test_files_hold_what_memory_gives(kind, method, tmp_path, capsys):
    data = saved(kind, tmp_path)
    assert run(tmp_path, f"--method={method}", f"--data={data.source}") == 0
    printed = capsys.readouterr().out
    model = moe_reduce.load(tmp_path / "model")
    data = dataclasses.replace(data, validation_fraction=0.0)
    whole = WholeSplit(every_token(prepare(data, 384)[0]), data, 4)
    settings = calibrated.Settings(method, schemes_by_path(model.config, every_component(model.config, INT4)))
    expected, report = calibrated.quantise(model, [whole[index] for index in range(len(whole))], settings)
    found, wanted = (trees.flatten(params) for params in (moe_reduce.load(tmp_path / "out").params, expected.params))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert jax.tree.structure(found[path]) == jax.tree.structure(value), path
        jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours, theirs, err_msg=path), found[path], value)  # noqa: B023
    named = re.findall(r"expert (\d+) of layer (\d+) got (\d+) tokens", printed)
    assert [(int(layer), int(expert), int(tokens)) for expert, layer, tokens in named] == report.rare
    assert kind != "layer" or 0 < len(report.rare) < 8
    (step,) = manifest.read_chain(tmp_path / "out")
    assert (step.arguments["method"], step.arguments["data"]) == (method, data.source)
    component = "feed_forward" if kind == "neox" else "experts"
    assert step.quality is not None
    found_error = step.quality[f"relative_squared_error_of_products.{component}"]
    assert found_error == pytest.approx(report.errors()[component], rel=1e-4)


def test_one_layer_is_read_at_a_time(tmp_path, monkeypatch):
    data = saved("layer", tmp_path)
    calls = []
    read = streamed.Streamed._read

    def noting(self, leaf, index):
        calls.append(index)
        return read(self, leaf, index)

    monkeypatch.setattr(streamed.Streamed, "_read", noting)
    assert run(tmp_path, "--method=gptq", f"--data={data.source}") == 0
    layers = [index[0] for index in calls if index]
    assert layers == sorted(layers)
    assert len(layers) == 2 * len(
        [path for path in trees.flatten(initial_params(MODELS["layer"])) if "layers/" in path]
    )


def test_kept_components_stay_and_awq_folds_into_what_is_quantised_only(tmp_path):
    data = saved("layer", tmp_path)
    options = ["--scheme=experts=int4-channel", "--method=awq", f"--data={data.source}"]
    assert run(tmp_path, *options) == 0
    found, given = (trees.flatten(moe_reduce.load(tmp_path / name).params) for name in ("out", "model"))
    changed = {path for path, leaf in found.items() if is_quantised(leaf) or not np.array_equal(leaf, given[path])}
    folded = {"layers/mlp_norm/scale", "layers/router/weight"}
    assert changed == folded | {f"layers/experts/{name}" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--method=gptq"], "--method=gptq needs calibration text: give --data"),
        (["--data=text.txt"], "--data does nothing with --method=rtn"),
        (["--method=awq", "--data=nowhere.npy"], "cannot read nowhere.npy"),
    ],
)
def test_mistakes_are_one_line(options, part, tmp_path, capsys):
    saved("dense", tmp_path)
    assert run(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(tmp_path, capsys):
    saved("dense", tmp_path)
    np.save(tmp_path / "other.npy", np.full((4, 32), 500, np.int32))
    assert run(tmp_path, "--method=gptq", f"--data={tmp_path / 'other.npy'}") == 2
    assert "holds the token id 500 but model.vocab_size is 384" in capsys.readouterr().err
