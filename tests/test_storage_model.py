"""Saving a whole directory: nothing half-made, the manifest and its chain, the model as a value."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers_models import written

import moe_reduce
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input, Step
from moe_reduce.storage import manifest


@pytest.fixture
def model(tmp_path: Path) -> moe_reduce.Model:
    written(tmp_path / "theirs", "llama")
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    (tmp_path / "theirs/notes.txt").write_text("stays behind")
    return moe_reduce.load(tmp_path / "theirs")


def step(model: moe_reduce.Model) -> Step:
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert model.source is not None
    return Step("prune", {"keep": 0.5}, (manifest.input_of(model.source),), count, count, {"loss": 1.5}, [[[0, 3]]])


def test_files_of_a_saved_model(tmp_path: Path, model: moe_reduce.Model):
    moe_reduce.save(model, str(tmp_path / "new/place"))
    names = {file.name for file in (tmp_path / "new/place").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "manifest.json"}
    assert names == expected
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["place"]


def test_manifest_content(tmp_path: Path, model: moe_reduce.Model):
    done = step(model)
    moe_reduce.save(model, tmp_path / "one", done)
    content = manifest.read(tmp_path / "one")
    assert content is not None
    assert set(content["versions"]) == {"moe_reduce", "jax", "flax", "numpy", "safetensors", "python"}
    assert set(content["files"]) == {file.name for file in (tmp_path / "one").iterdir()} - {"manifest.json"}
    assert content["parameters"]["total"] == done.parameters_before
    assert content["parameters"]["attention"] == 2 * 2 * 24 * 8 * (4 + 2)
    assert manifest.verify(tmp_path / "one") == []


def test_chain_grows_and_names_its_inputs(tmp_path: Path, model: moe_reduce.Model):
    first = step(model)
    moe_reduce.save(model, tmp_path / "one", first)
    one = moe_reduce.load(tmp_path / "one")
    assert one.chain == (first,)
    second = step(one)
    assert second.inputs == (Input(str(tmp_path / "one"), manifest.sha256_of_file(tmp_path / "one/manifest.json")),)
    moe_reduce.save(one, tmp_path / "two", second)
    assert moe_reduce.load(tmp_path / "two").chain == (first, second)


def test_input_without_manifest_hashes_the_weights(model: moe_reduce.Model):
    assert model.source is not None
    before = manifest.input_of(model.source).sha256
    flip(model.source / "model.safetensors", -1)
    assert manifest.input_of(model.source).sha256 != before


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_verify_finds_what_changed(tmp_path: Path, model: moe_reduce.Model):
    place = tmp_path / "one"
    moe_reduce.save(model, place)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        flip(place / name, len((place / name).read_bytes()) // 2)
        (problem,) = manifest.verify(place)
        assert name in problem
        flip(place / name, len((place / name).read_bytes()) // 2)
    assert manifest.verify(place) == []
    (place / "model-00001-of-00002.safetensors").write_bytes(b"")
    (place / "tokenizer.json").unlink()
    assert len(manifest.verify(place)) == 2
    (place / "manifest.json").unlink()
    assert len(manifest.verify(place)) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', '{"files": {}, "chain": [{"command": "x"}]}'])
def test_damaged_manifest(tmp_path: Path, model: moe_reduce.Model, content: str):
    moe_reduce.save(model, tmp_path / "one")
    (tmp_path / "one/manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest"):
        moe_reduce.load(tmp_path / "one")


def test_existing_paths(tmp_path: Path, model: moe_reduce.Model):
    place = tmp_path / "one"
    moe_reduce.save(model, place)
    (place / "mine.txt").write_text("")
    with pytest.raises(UserError, match="exists"):
        moe_reduce.save(model, place)
    with pytest.raises(UserError, match=r"holds mine\.txt, which moe-reduce did not write"):
        moe_reduce.save(model, place, overwrite=True)
    assert (place / "mine.txt").exists()
    (place / "mine.txt").unlink()
    moe_reduce.save(model, place, overwrite=True)
    again = moe_reduce.load(place)
    moe_reduce.save(again, place, overwrite=True)  # onto its own source
    assert (place / "tokenizer.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "theirs"}


def test_overwrite_spares_what_is_no_model(tmp_path: Path, model: moe_reduce.Model):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("home", "file"):
        with pytest.raises(UserError, match="not a model directory"):
            moe_reduce.save(model, tmp_path / name, overwrite=True)
    assert (tmp_path / "home/thesis.txt").exists()


def test_full_disk_leaves_nothing(tmp_path: Path, model: moe_reduce.Model):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # bytes a file; writing more is an OSError
    try:
        with pytest.raises(UserError, match="cannot write"):
            moe_reduce.save(model, tmp_path / "one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_parent_is_a_file(tmp_path: Path, model: moe_reduce.Model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        moe_reduce.save(model, tmp_path / "file/model")


KILLED = """
import os, signal, sys
import moe_reduce
from moe_reduce.storage import manifest
model = moe_reduce.load(sys.argv[1])
manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
moe_reduce.save(model, sys.argv[2], overwrite=True)
"""


def test_kill_leaves_the_old_model_whole(tmp_path: Path, model: moe_reduce.Model):
    place = tmp_path / "one"
    moe_reduce.save(model, place)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "theirs"), str(place)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert manifest.verify(place) == []
    moe_reduce.load(place)


def test_model_is_called_and_left_unchanged(model: moe_reduce.Model):
    tokens_BT = np.arange(12, dtype=np.int32).reshape(2, 6)
    logits_BTV = model(tokens_BT)
    assert logits_BTV.shape == (2, 6, 61)
    assert logits_BTV.dtype == np.float32
    np.testing.assert_array_equal(model(tokens_BT.tolist()), logits_BTV)
    np.testing.assert_array_equal(model(jax.numpy.asarray(tokens_BT)), logits_BTV)
    for wrong in ([[61]], [[-1]], [1, 2], [[0.5]], [[]], jax.numpy.array([[61]]), jax.numpy.array([[0.5]])):
        with pytest.raises(UserError, match="token"):
            model(wrong)
    np.testing.assert_allclose(jax.jit(model)(tokens_BT), logits_BTV, atol=1e-5)


def test_package_import_is_light():
    code = "import sys, moe_reduce; assert 'jax' not in sys.modules; moe_reduce.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        moe_reduce.nothing  # noqa: B018


def test_config_json_is_sorted(tmp_path: Path, model: moe_reduce.Model):
    moe_reduce.save(model, tmp_path / "one")
    content = json.loads((tmp_path / "one/config.json").read_text())
    assert list(content) == sorted(content)


def test_a_package_that_is_not_installed_has_no_version():
    assert manifest.versions(["numpy", "never-installed"]) == {"numpy": np.__version__, "never-installed": None}
