"""The command `quantize`: every scheme on disk, mixed precision, reports, limits of memory, and mistakes."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig, ModelConfig
from moe_reduce.core.schemes import SCHEMES, parse
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameters
from moe_reduce.models.weights import Quantised
from moe_reduce.planning.serving import bytes_by_component
from moe_reduce.quantization.clipping import ranges
from moe_reduce.quantization.round_to_nearest import every_component, quantise
from moe_reduce.storage.tensors import TensorFiles

TOKENS_BT = np.arange(16, dtype=np.int32).reshape(4, 4)
WIDE = {"width": 128, "head_width": 32}


def wide(config: ModelConfig) -> ModelConfig:
    """A tiny model whose matrices have inputs that groups of 128 divide."""
    moe = None if config.moe is None else dataclasses.replace(config.moe, width=128)
    width = None if config.feed_forward_width is None else 128
    return dataclasses.replace(config, **WIDE, feed_forward_width=width, moe=moe)


@pytest.fixture(params=["tiny_dense", pytest.param("tiny_neox", marks=pytest.mark.slow), "tiny_layer_moe"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return wide(request.getfixturevalue(request.param))


def saved(config: ModelConfig, directory: Path) -> Model:
    model = Model(config, init_params(config, jax.random.key(0)), ExecutionConfig().resolve("cpu"))
    moe_reduce.save(model, directory)
    return model


def run(tmp_path: Path, *options: str, out: str = "out") -> int:
    return main(["quantize", f"--model={tmp_path / 'model'}", f"--out={tmp_path / out}", *options])


def assert_same(found: trees.Tree, expected: trees.Tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


FEW = ("int8", "int4-affine-g64", "fp8-block", "fp8-tensor", "nf4", "mxfp4", "ternary")


def test_from_file_to_file_is_what_memory_gives(config, tmp_path, capsys):
    model = saved(config, tmp_path / "model")
    for name in FEW:
        assert run(tmp_path, f"--scheme={name}", out=name) == 0
        expected = quantise(model, every_component(config, parse(name)))
        found = moe_reduce.load(tmp_path / name)
        assert_same(found.params, expected.params)
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / name)
        moe_reduce.save(found, tmp_path / "again", overwrite=True)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes_on_disk_and_in_memory_are_those_of_the_plan(scheme, tiny_layer_moe, tmp_path):
    config = wide(tiny_layer_moe)
    saved(config, tmp_path / "model")
    assert run(tmp_path, f"--scheme={scheme}") == 0
    planned = sum(bytes_by_component(config, str(scheme)).values())
    kept = [record for record in parameters(config) if not record.is_matrix or record.component == "router"]
    planned += 2 * sum(int(np.prod(record.shape)) for record in kept)  # which are fp32 here, and bf16 in a plan
    entries = TensorFiles(tmp_path / "out").entries.values()
    assert sum(entry.stop - entry.start for entry in entries) == planned
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(moe_reduce.load(tmp_path / "out").params)) == planned


def test_mixed_precision_and_its_report(tiny_layer_moe, tmp_path, capsys):
    config = wide(tiny_layer_moe)
    saved(config, tmp_path / "model")
    assert run(tmp_path, "--scheme=experts=int4-g64,attention=int8,router=keep", "--clip=mse") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["experts"][:2] == ["int4-g64", "4.250"]
    assert rows["attention"][0] == "int8"
    assert [rows[name][0] for name in ("router", "norm", "embedding", "unembedding")] == ["keep"] * 4
    found = moe_reduce.load(tmp_path / "out")
    schemes = {
        path.split("/")[1]: str(leaf.scheme)
        for path, leaf in trees.flatten(found.params).items()
        if isinstance(leaf, Quantised)
    }
    assert schemes == {"attention": "int8", "experts": "int4-g64"}
    (step,) = json.loads((tmp_path / "out/manifest.json").read_text())["chain"]
    assert step["arguments"]["schemes"] == {"attention": "int8", "experts": "int4-g64"}
    assert step["arguments"]["clip"] == "mse"
    assert 0.02 < step["quality"]["relative_error.experts"] < 0.2
    assert 0 < step["quality"]["relative_error.attention"] < 0.02
    assert float(rows["experts"][-1].rstrip("%")) == pytest.approx(
        100 * step["quality"]["relative_error.experts"], abs=0.006
    )


@pytest.mark.parametrize("name", ["int4-g32", "ternary", "int4-affine-g32"])
def test_a_search_leaves_less_error(name, tiny_dense):
    config = wide(tiny_dense)
    params = jax.tree.map(lambda leaf: leaf + 0.5 * leaf**3 / 0.02**2, init_params(config, jax.random.key(0)))
    model = Model(config, params, ExecutionConfig().resolve("cpu"))

    def error(clip: str) -> float:
        found = quantise(model, {"feed_forward": parse(name)}, ranges(clip)).params["layers"]["mlp"]["up"].dequantised()
        return float(np.sum(np.square(np.asarray(found) - np.asarray(params["layers"]["mlp"]["up"]))))

    assert error("mse") < 0.98 * error("min-max")
    assert np.isfinite(error("percentile"))


def test_two_layers_and_a_buffer_are_the_peak(tiny_dense, tmp_path):
    config = dataclasses.replace(wide(tiny_dense), layers=12)
    model = saved(config, tmp_path / "model")
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["layers"])) / config.layers
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    del model
    assert run(tmp_path, "--scheme=int8", out="first") == 0  # compiles
    tracemalloc.start()
    assert run(tmp_path, "--scheme=int8") == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    buffers = 12 * 2**20  # two of 4 MB of the writer, and Python's own
    assert peak < 2 * layer + buffers < whole + buffers
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheme=int3"], "scheme 'int3' is unknown"),
        (["--scheme=expert=int4-g64"], "the model has no component 'expert'; it has attention"),
        (["--scheme=norm=int8"], "the model has no matrices of 'norm' to quantise"),
        (["--scheme=int4-g128"], "groups of 128 do not divide the 16 inputs of"),
        (["--scheme=int8", "--group-size=48"], "--group-size=48 does not go with int8"),
        (["--scheme=fp8", "--group-size=64"], "--group-size=64 does not go with fp8"),
        (["--scheme=int8", "--keep=mlps"], "the model has no 'mlps'"),
        (["--scheme=feed_forward=keep"], "quantises nothing"),
        (["--scheme=nf4", "--format=compressed-tensors"], "do not divide"),
        (["--scheme=ternary", "--format=compressed-tensors"], "compressed-tensors has no ternary"),
        (["--scheme=int8,embedding=int8", "--format=compressed-tensors"], "opens no quantised token table"),
    ],
)
def test_mistakes_are_one_line(tiny_dense, tmp_path, capsys, options, words):
    saved(tiny_dense, tmp_path / "model")
    assert run(tmp_path, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_write_what_they_make(tiny_layer_moe, tmp_path, capsys, method):
    config = wide(tiny_layer_moe)
    saved(config, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32))
    data = [f"--data={tmp_path / 'tokens.npy'}", "--batch-size=4", f"--cache={tmp_path / 'cache'}"]
    assert run(tmp_path, "--scheme=experts=int4,attention=int4-g32", f"--method={method}", *data) == 0
    shown = capsys.readouterr().out
    assert "tokens: rounded to nearest" in shown, "64 tokens are the least of an expert"
    found = moe_reduce.load(tmp_path / "out")
    experts = found.params["layers"]["experts"]["up"]
    assert (str(experts.scheme), experts.shape) == ("int4-g128", (2, 4, 128, 128))
    assert np.all(np.isfinite(found(TOKENS_BT)))
    (step,) = json.loads((tmp_path / "out/manifest.json").read_text())["chain"]
    assert (step["arguments"]["method"], step["arguments"]["data"]) == (method, str(tmp_path / "tokens.npy"))
    assert 0 < step["quality"]["relative_squared_error_of_products.attention"] < 0.05
    for wrong, words in (([], "needs calibration text: give --data"), (["--method=rtn", *data], "--data does nothing")):
        assert run(tmp_path, "--scheme=int4", f"--method={method}", *wrong, out="x") == 2
        assert words in capsys.readouterr().err


def test_quantising_twice_is_refused(tiny_dense, tmp_path, capsys):
    saved(tiny_dense, tmp_path / "model")
    assert run(tmp_path, "--scheme=int8", out="model2") == 0
    capsys.readouterr()
    assert main(["quantize", f"--model={tmp_path / 'model2'}", f"--out={tmp_path / 'x'}", "--scheme=int8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "quantised already: quantise the model that it was made from" in line


def test_an_architecture_of_our_own_is_not_for_transformers(tiny_shared, tmp_path, capsys):
    saved(tiny_shared, tmp_path / "model")
    assert run(tmp_path, "--scheme=int8", "--format=compressed-tensors") == 2
    assert "only moe_reduce opens this architecture" in capsys.readouterr().err
