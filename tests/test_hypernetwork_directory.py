"""Hypernetworks on disk, and the adapters that they write there."""

import dataclasses
import json

import pytest
from test_hypernetwork import CONFIGS, WIDTH, disturbed, embeddings, model_of
from training_runs import assert_close

from moe_reduce.adapters import adapter_directory
from moe_reduce.adapters.hypernetwork import directory as directories
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.adapters.hypernetwork.encoders import Cached, OneHot
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.storage import manifest

BASE = Input("base", "0" * 64)
ENCODER = OneHot([f"task {number}" for number in range(WIDTH)])


def saved(path, head="L", scored=False):
    hypernetwork = disturbed(hypernetworks.init(CONFIGS[head], model_of("dense"), WIDTH))
    if scored:
        hypernetwork = hypernetworks.z_scored(hypernetwork, hypernetworks.written(hypernetwork, embeddings(3)))
        hypernetwork = disturbed(hypernetwork)
    trained = directories.Trained(hypernetwork, BASE, directories.encoder_entry(ENCODER), ("task 0", "task 1"))
    path.mkdir()
    directories.save(trained, path)
    return trained


@pytest.mark.parametrize(("head", "scored"), [("L", True), ("S", False), ("core", False)])
def test_round_trip(tmp_path, head, scored):
    before = saved(tmp_path / "hypernetwork", head, scored)
    after = directories.load(tmp_path / "hypernetwork", BASE)
    assert dataclasses.astuple(after.base) == dataclasses.astuple(BASE)
    assert (after.encoder, after.tasks) == (before.encoder, before.tasks)
    assert after.hypernetwork.config == before.hypernetwork.config
    assert after.hypernetwork.base == before.hypernetwork.base
    for one, two in zip(*(hypernetworks.written(t.hypernetwork, embeddings(2)) for t in (before, after)), strict=True):
        assert_close(one.tree, two.tree)
    assert manifest.verify(tmp_path / "hypernetwork") == []


def test_an_adapter_is_written_once_for_a_description(tmp_path, monkeypatch):
    trained = saved(tmp_path / "hypernetwork")
    encoder = Cached(ENCODER, tmp_path / "embeddings")
    arguments = (tmp_path / "hypernetwork", "task 2", encoder, tmp_path / "adapters", BASE)
    path = directories.write_adapter(*arguments)
    adapter = adapter_directory.load(path, trained.hypernetwork.base, BASE)
    (expected,) = hypernetworks.written(trained.hypernetwork, ENCODER.encode(["task 2"]))
    assert_close(adapter.tree, expected.tree)
    assert json.loads((path / "task.json").read_text())["description"] == "task 2"
    monkeypatch.setattr(hypernetworks, "written", lambda *_: pytest.fail("it is written already"))
    assert directories.write_adapter(*arguments) == path
    monkeypatch.undo()
    several = directories.write_adapters(trained, ["task 3", "task 2", "task 3"], encoder, tmp_path / "adapters")
    assert several[1] == path
    assert several[0] == several[2] != path


def refused(part, function, *arguments):
    with pytest.raises(UserError, match=part) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def test_what_does_not_belong_to_it_is_refused(tmp_path):
    path = tmp_path / "hypernetwork"
    trained = saved(path, "core")
    refused("is a hypernetwork for base, and other is another model", directories.load, path, Input("other", "1" * 64))
    wide = OneHot([f"task {number}" for number in range(WIDTH + 1)])
    refused(f"reads embeddings of width {WIDTH}", directories.write_adapter, path, "task 2", wide, tmp_path)
    others = OneHot([f"job {number}" for number in range(WIDTH)])
    refused("has other files than one-hot", directories.write_adapter, path, "job 2", others, tmp_path)
    refused("description 1 is empty", directories.write_adapter, path, " ", ENCODER, tmp_path)
    refused("task task 1 trained this hypernetwork", trained.check_unseen, ("task 5", "task 1"))


def test_a_changed_directory_is_refused(tmp_path):
    path = tmp_path / "hypernetwork"
    saved(path, "core")
    config = json.loads((path / directories.CONFIG).read_text())

    def with_config(changed):
        (path / directories.CONFIG).write_text(json.dumps(changed))
        content = json.loads((path / manifest.MANIFEST_FILE).read_text())
        content["files"][directories.CONFIG] = manifest.sha256_of_file(path / directories.CONFIG)
        (path / manifest.MANIFEST_FILE).write_text(json.dumps(content))

    with_config(config | {"projections": "1" * 64})
    refused("projections of .* do not have the hash", directories.load, path)
    adapter = config["hypernetwork"]["adapter"] | {"sketch_width": 3}
    with_config(config | {"hypernetwork": config["hypernetwork"] | {"adapter": adapter}})
    refused("parameter head_query/bias does not fit config.json", directories.load, path)
    with_config({name: value for name, value in config.items() if name != "tasks"})
    refused("does not describe a hypernetwork", directories.load, path)
    (path / directories.CONFIG).write_text("{}")
    refused("config.json has changed: its SHA-256", directories.load, path)
    (path / directories.WEIGHTS).unlink()
    refused("config.json has changed|is missing", directories.load, path)
    refused("has no manifest.json: give the directory of a hypernetwork", directories.load, tmp_path)
