"""Exported models give the model's logits in runtimes that know nothing of us; nothing half-made is left."""

import dataclasses
import errno
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.moe.routing import MANY
from moe_reduce.storage import export, export_formats, manifest

RELOAD = """
import sys
import jax.export, numpy
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
numpy.save(sys.argv[3], exported.call(numpy.load(sys.argv[2])))
assert not any(name.startswith(("moe_reduce", "flax")) for name in sys.modules)
"""


def saved(config, directory: Path) -> Path:
    params = jax.tree.map(np.asarray, init_params(dataclasses.replace(config, init_std=0.3), jax.random.key(0)))
    moe_reduce.save(moe_reduce.Model(config, params, ExecutionConfig().resolve("cpu")), directory)
    return directory


@pytest.fixture
def dense(tiny_dense, tmp_path) -> Path:
    return saved(tiny_dense, tmp_path / "model")


def exported(model: Path, *arguments: str, status: int = 0) -> Path:
    out = model.parent / "out"
    assert main(["export", f"--model={model}", f"--out={out}", *arguments]) == status
    return out


def refused(capsys, model: Path, *arguments: str) -> str:
    """The one line of a refusal that leaves the directory as it was."""
    before = sorted(model.parent.rglob("*"))
    exported(model, *arguments, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert sorted(model.parent.rglob("*")) == before
    return line


def tokens_of(shape) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 64, shape, dtype=np.int32)


def by_onnxruntime(file: Path, tokens_BT: np.ndarray) -> np.ndarray:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("tokens", ["batch", "time"], "tensor(int32)")
    assert (made.name, made.shape, made.type) == ("logits", ["batch", "time", 64], "tensor(float)")
    return session.run(None, {"tokens": tokens_BT})[0]


def by_a_fresh_process(file: Path, tokens_BT: np.ndarray) -> np.ndarray:
    given, made = file.with_name("tokens.npy"), file.with_name("logits.npy")
    np.save(given, tokens_BT)
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", RELOAD, file, given, made], check=True, cwd=file.parent, env=environment)
    return np.load(made)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_layer_moe", "tiny_shared", "pooled"])
def test_other_runtimes_give_the_same_logits_at_any_size(request, tmp_path, name):
    config = request.getfixturevalue("tiny_shared" if name == "pooled" else name)
    if name == "pooled":  # all that the global pool adds
        extras = {"score_function": "sigmoid", "selection_bias": True, "score_offset": True, "output_gain": True}
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, router="layer", **extras))
    model = saved(config, tmp_path / "model")
    out = exported(model, "--format=both")
    assert {file.name for file in out.iterdir()} == {"model.stablehlo", "model.onnx", "export.json"}
    tokens_BT = tokens_of((4, 9))
    expected = np.asarray(moe_reduce.load(model)(tokens_BT))
    assert np.ptp(expected) > 1
    for found in (
        by_onnxruntime(out / "model.onnx", tokens_BT),
        by_a_fresh_process(out / "model.stablehlo", tokens_BT),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_pool_of_many_experts_is_exported_at_any_size(tiny_shared, tmp_path):
    """Of as many as are ranked by groups."""
    moe = dataclasses.replace(tiny_shared.moe, experts=MANY, active=2, width=4)
    model = saved(dataclasses.replace(tiny_shared, layers=1, moe=moe), tmp_path / "model")
    tokens_BT = tokens_of((2, 5))
    expected = np.asarray(moe_reduce.load(model)(tokens_BT))
    assert np.ptp(expected) > 1
    found = by_onnxruntime(exported(model, "--format=onnx") / "model.onnx", tokens_BT)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_export_json_says(dense, capsys, caplog):
    out = exported(dense, "--format=both", "--batch-size=2")
    content = json.loads((out / "export.json").read_text())
    assert content["command"] == f"moe-reduce export --model={dense} --out={out} --format=both --batch-size=2"
    assert content["model"]["sha256"] == manifest.input_of(dense).sha256
    assert {"jax", "jax2onnx", "onnx", "onnxruntime", "moe_reduce"} <= set(content["versions"])
    assert content["inputs"] == [{"name": "tokens", "shape": [2, "time"], "dtype": "int32"}]
    assert content["outputs"] == [{"name": "logits", "shape": [2, "time", 64], "dtype": "float32"}]
    assert content["checked_on"] == [[2, 5], [2, 16]]
    assert content["files"]["model.onnx"]["opset"] == 23
    assert content["files"]["model.stablehlo"]["platforms"] == ["cpu", "cuda", "tpu"]
    for name, file in content["files"].items():
        assert file["sha256"] == manifest.sha256_of_file(out / name)
        assert 0 <= file["largest_difference"] <= file["tolerance"] < 1e-2
        assert file["argmax_agreement"] == 1.0
    captured = capsys.readouterr()
    assert captured.out.count("largest logit difference") == 2
    assert captured.out.splitlines()[-1] == str(out)
    assert captured.err == ""
    assert not [record for record in caplog.records if record.name.startswith(("jax2onnx", "onnx", "root"))]


def test_a_file_is_the_same_wherever_it_is_made(dense):
    again = dense.parent / "again/deeper/model"
    shutil.copytree(dense, again)
    first, second = [
        (exported(model, "--format=stablehlo") / "model.stablehlo").read_bytes() for model in (dense, again)
    ]
    assert first == second
    assert b".py" not in first
    assert str(Path(moe_reduce.__file__).parent).encode() not in first


def test_fixed_sizes_are_the_only_ones(dense):
    file = exported(dense, "--format=stablehlo", "--batch-size=2", "--sequence-length=8") / "model.stablehlo"
    function = jax.export.deserialize(bytearray(file.read_bytes()))
    assert function.call(tokens_of((2, 8))).shape == (2, 8, 64)
    with pytest.raises(ValueError, match="2"):
        function.call(tokens_of((3, 8)))


def test_an_existing_directory_is_kept_unless_it_may_be_overwritten(dense, capsys):
    out = exported(dense, "--format=stablehlo")
    assert "--overwrite" in refused(capsys, dense, "--format=stablehlo")
    (out / "extra").write_text("of another hand")
    assert "holds extra" in refused(capsys, dense, "--format=stablehlo", "--overwrite")
    (out / "extra").unlink()
    exported(dense, "--format=stablehlo", "--overwrite")
    assert {file.name for file in out.iterdir()} == {"model.stablehlo", "export.json"}
    (out / "export.json").unlink()
    assert "not an exported model" in refused(capsys, dense, "--format=stablehlo", "--overwrite")


@pytest.mark.parametrize("package", ["flatbuffers", "jax2onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(dense, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, dense, "--format=both")
    assert f"needs the package {package}" in line
    assert "pip install" in line


def test_a_full_disk_leaves_nothing(dense, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refused(capsys, dense, "--format=stablehlo")


def test_wrong_logits_are_not_kept(dense, capsys, monkeypatch):
    right = export_formats.logits
    monkeypatch.setattr(export_formats, "logits", lambda *given: right(*given) + np.float32(0.1))
    line = refused(capsys, dense, "--format=stablehlo")
    assert "differ by 0.1" in line
    monkeypatch.setattr(export_formats, "logits", lambda *given: right(*given) * np.float32("nan"))
    assert "differ by nan" in refused(capsys, dense, "--format=stablehlo")


def test_what_a_format_cannot_express_is_told_in_one_line(dense, capsys, monkeypatch):
    def lacking(*_, **__):
        raise NotImplementedError("no plugin for\nthis primitive")

    monkeypatch.setattr("jax2onnx.to_onnx", lacking)
    assert "cannot express this model: NotImplementedError: no plugin for" in refused(capsys, dense, "--format=both")


def test_mistakes_are_found_before_a_weight_is_read(dense, capsys, monkeypatch):
    (dense / "model.safetensors").unlink()
    assert "--batch-size must be positive" in refused(capsys, dense, "--format=onnx", "--batch-size=0")
    assert "--sequence-length must be positive" in refused(capsys, dense, "--format=onnx", "--sequence-length=-1")
    monkeypatch.setattr(export, "FILE_LIMIT", 1000)
    assert "GB in fp32" in refused(capsys, dense, "--format=stablehlo")
