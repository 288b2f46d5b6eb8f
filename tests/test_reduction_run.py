"""A reduction of several stages through the real command line: what each leaves, resuming, and what is refused."""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from training_runs import MODELS, assert_close, losses, metrics, token_data, unmeasured_peak

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.commands import config_file
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, MeshConfig, reduce_from_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import PruneStage, TuneStage
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.weights import is_quantised
from moe_reduce.reduction import scores
from moe_reduce.runs import reduce as run_module
from moe_reduce.runs import stages
from moe_reduce.runs.stages import annealing, scoring
from moe_reduce.storage.manifest import verify
from moe_reduce.training import job
from moe_reduce.training.checkpoints import Checkpoints

CONFIG = """
from moe_reduce.core import config as defaults


def get_config():
    config = defaults.reduce_base()
    config.model = {model!r}
    config.mesh.data = 1
    config.data.update(source={source!r}, sequence_length=32, validation_fraction=0.25)
    config.execution.block_rows = 8
    config.train.update(batch_size=8, log_every=1, evaluate_every=100, evaluate_batches=2, checkpoint_every=2)
    config.update(defaults.in_order({{
        "pool": defaults.stage("pool", router={router!r}),
        "anneal": defaults.stage("tune", steps=6, learning_rate=1e-2, bias_from=4.0, anneal_share=0.5),
        "prune_50": defaults.stage("prune", keep=0.5, criterion="reap_total", calibration_batches=2),
        "recover_50": defaults.stage("tune", steps=4, components="router,norm", teacher_weight=0.5),
    }}))
    return config
"""


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(job, "peak", unmeasured_peak)


def write(directory, router="shared"):
    """A model of 4 experts in each of 2 layers, and a configuration, whose path is returned."""
    config = dataclasses.replace(MODELS["layer"], init_std=0.3)
    params = init_params(config, jax.random.key(0))
    moe_reduce.save(Model(config, params, ExecutionConfig()), directory / "model", overwrite=True)
    data = token_data(directory)
    file = directory / "config.py"
    file.write_text(CONFIG.format(model=str(directory / "model"), source=data.source, router=router))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with model/, config.py and the finished run/ of it."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        assert _reduce(write(directory), directory / "run") == 0
    return directory


def _reduce(file, workdir, *more):
    return main(["reduce", f"--config={file}", f"--workdir={workdir}", *more])


def test_every_stage_leaves_a_model_and_figures(finished):
    work = finished / "run"
    summary = json.loads((work / "summary.json").read_text())
    names = ["original", "pool", "anneal", "prune_50", "recover_50"]
    assert [stage["name"] for stage in summary["stages"]] == names
    assert [stage["experts"] for stage in summary["stages"]] == [8, 8, 8, 4, 4]
    losses = [stage["validation"]["loss"] for stage in summary["stages"]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5), "a lossless start"
    assert losses[2] != pytest.approx(losses[1], rel=1e-4)
    models = [moe_reduce.load(work / f"{number:02d}-{name}/model") for number, name in enumerate(names) if number]
    pooled, annealed, pruned, recovered = models
    # what was said to train did, and nothing else
    assert _changed(pooled, annealed) == {"router/weight", "layers/router_bias"}
    norms = {path for path in trees.flatten(pruned.params) if "norm" in path}
    assert len(norms) == 5
    assert _changed(pruned, recovered) == {"router/weight"} | norms
    bias = np.asarray(annealed.params["layers"]["router_bias"])
    np.testing.assert_array_equal(bias, 0)
    assert [step.command for step in recovered.chain] == ["reduce"] * 4
    (kept,) = recovered.chain[2].kept_experts
    scores = np.asarray(json.loads((work / "03-prune_50/scores.json").read_text())["scores"]["reap_total"][0])
    best = sorted(np.argsort(-scores, kind="stable")[:4].tolist())
    assert kept == [[index // 4, index % 4] for index in best]
    assert verify(work / "04-recover_50/model") == []
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")


def _changed(before, after):
    old, new = trees.flatten(before.params), trees.flatten(after.params)
    return {path for path in old if not np.array_equal(np.asarray(old[path]), np.asarray(new[path]))}


@pytest.mark.slow
def test_eight_devices_reduce_as_one_does(finished, tmp_path):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "expert")]
    order = "--config.order=pool,anneal,prune_50"
    assert _reduce(finished / "config.py", tmp_path / "run", *mesh, order) == 0
    one, eight = (json.loads((place / "run/summary.json").read_text())["stages"] for place in (finished, tmp_path))
    for stage, wanted in zip(eight, one[:4], strict=True):
        assert stage["name"] == wanted["name"]
        assert stage["validation"]["loss"] == pytest.approx(wanted["validation"]["loss"], rel=1e-4)
    kept = [moe_reduce.load(place / "run/03-prune_50/model").chain[-1].kept_experts for place in (finished, tmp_path)]
    assert kept[0] == kept[1]


def test_anneals_in_a_straight_line_with_a_router_in_each_layer(tmp_path):
    file = write(tmp_path, router="layer")
    more = ["--config.stages.anneal.bias_to=1.0", "--config.order=pool,anneal"]
    assert _reduce(file, tmp_path / "run", *more) == 0
    model = moe_reduce.load(tmp_path / "run/02-anneal/model")
    bias = np.asarray(model.params["layers"]["router_bias"])
    home = np.repeat([0, 1], 4)
    np.testing.assert_allclose(bias, np.where(home[None] == np.array([[0], [1]]), 0.0, -1.0))


def test_resumes_where_it_was_stopped(finished, tmp_path, monkeypatch, capsys):
    file = finished / "config.py"
    once = stages.run_stage

    def stopped(stage, model, place):
        if place.directory.name == "03-prune_50":
            raise KeyboardInterrupt
        return once(stage, model, place)

    monkeypatch.setattr(run_module, "run_stage", stopped)
    assert _reduce(file, tmp_path / "run") == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted: run the same command again to go on")
    monkeypatch.setattr(run_module, "run_stage", once)
    # as if killed within the training of a stage: its checkpoint of step 4 is the last thing written
    shutil.rmtree(tmp_path / "run/02-anneal/model")
    (tmp_path / "run/02-anneal/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/02-anneal/checkpoints/6")
    restored = []
    once_restored = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, step, wanted: (restored.append(step), once_restored(self, step, wanted))[1]
    )
    assert _reduce(file, tmp_path / "run") == 0
    assert restored == [4]
    assert f"{tmp_path / 'run'} resumes at stage 2 of 4, anneal" in capsys.readouterr().out.splitlines()
    for stage in ("02-anneal", "04-recover_50"):
        left, right = (moe_reduce.load(place / "run" / stage / "model") for place in (finished, tmp_path))
        assert_close(left.params, right.params)


def test_done_says_so(finished, capsys):
    before = (finished / "run/summary.json").stat().st_mtime_ns
    assert _reduce(finished / "config.py", finished / "run") == 0
    out = capsys.readouterr().out
    assert "is done" in out
    assert out.splitlines()[-1] == str(finished / "run/summary.json")
    assert (finished / "run/summary.json").stat().st_mtime_ns == before


def test_routers_learn_from_the_first_model(tmp_path):
    """The source's way: a random router, taught what the layers' routers choose."""
    file = write(tmp_path)
    text = file.read_text().replace('defaults.stage("pool",', 'defaults.stage("pool", start="random",')
    old = 'defaults.stage("tune", steps=6, learning_rate=1e-2, bias_from=4.0, anneal_share=0.5)'
    assert old in text
    new = 'defaults.stage("tune", steps=60, learning_rate=3e-2, objective="router")'
    file.write_text(text.replace(old, new))
    assert _reduce(file, tmp_path / "run", "--config.order=pool,anneal") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/02-anneal/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("--config.model=", "model is empty"),
        ("--config.model=nowhere", "nowhere is not a directory"),
        ("--config.order=pool,melt", "must name stages"),
        ("--config.order=pool,pool", "each once"),
        ("--config.stages.pool.kind=melt", "stages.pool.kind"),
        ("--config.stages.pool.offset=8.0", "stages.pool: an offset is for sigmoid scores"),
        ("--config.stages.anneal.components=routers", "the model has no 'routers'"),
        ("--config.stages.anneal.teacher_weight=2.0", "stages.anneal.teacher_weight"),
        ("--config.stages.anneal.objective=router", "stages.recover_50"),
        ("--config.stages.prune_50.criterion=size", "criterion 'size' is unknown"),
        ("--config.stages.prune_50.keep=0.1", "cannot be kept where 2 are active"),
        ("--config.order=prune_50,pool,anneal,recover_50", "cannot be kept"),
        ("--config.order=anneal,pool,prune_50,recover_50", "bias_from needs a pool"),
        ("--config.stages.anneal.bias_to=5.0", "must fall to"),
        ("--config.stages.recover_50.bias_to=1.0", "needs stages.recover_50.bias_from"),
        ("--config.train.ema_decay=0.9", "needs train.ema_decay=0"),
        ("--config.train.batch_size=0", "train.batch_size"),
        ("--config.mesh.fsdp=0", "mesh.fsdp"),
        ("--config.dtype=bf16", "dtype must be one of"),
        ("--config.mesh.tensor=2", "stages.prune_50 scores experts by their whole outputs"),
        ("--config.balance.bias_rate=0.1", "balance.bias_rate is for train"),
        ("--config.balance.entropy_floor=0.999", "routing collapsed"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, override, part):
    file = write(tmp_path)
    if override.startswith("--config.stages.anneal.objective"):
        override = "--config.stages.recover_50.objective=router"
    if override.startswith("--config.order=prune_50"):
        file.write_text(file.read_text().replace("keep=0.5", "keep=0.2"))
    assert _reduce(file, tmp_path / "run", override) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moe-reduce reduce: ")
    assert part in line


def test_routing_that_has_collapsed_stops_training(tmp_path, capsys):
    """Routers of zeros choose the first experts for every token."""
    file = write(tmp_path)
    model = moe_reduce.load(tmp_path / "model")
    routers = trees.select(model.params, "layers/router/weight", expect=1)
    same = trees.update(model.params, {path: np.zeros_like(router) for path, router in routers.items()})
    moe_reduce.save(dataclasses.replace(model, params=same), tmp_path / "model", overwrite=True)
    more = ["--config.order=recover_50", "--config.balance.entropy_floor=0.1"]
    assert _reduce(file, tmp_path / "run", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expert_entropy 0.000 is under balance.entropy_floor" in line


@pytest.mark.parametrize(
    "mesh", [(), pytest.param(("data", "fsdp", "expert"), marks=pytest.mark.slow)], ids=["one", "eight"]
)
def test_an_adapter_recovers_the_kept_experts(finished, tmp_path, mesh):
    """It trains beside frozen experts, and is merged into them behind the stage."""
    file = tmp_path / "config.py"
    adapter = 'adapter=defaults.AdapterConfig(method="skema", targets="mlp", sketch_width=4)'
    text = (finished / "config.py").read_text()
    old = 'components="router,norm", teacher_weight=0.5'
    assert old in text
    file.write_text(text.replace(old, f'components="router", learning_rate=1e-2, {adapter}'))
    assert _reduce(file, tmp_path / "run", *(f"--config.mesh.{axis}=2" for axis in mesh)) == 0
    pruned, recovered = (
        moe_reduce.load(tmp_path / "run" / name / "model") for name in ("03-prune_50", "04-recover_50")
    )
    experts = {f"experts/{name}" for name in ("gate", "up", "down")}
    assert _changed(pruned, recovered) == {"router/weight"} | experts
    assert recovered.config == pruned.config
    assert [step.command for step in recovered.chain[-2:]] == ["merge", "reduce"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    trained = json.loads((tmp_path / "run/04-recover_50/summary.json").read_text())["validation"]["loss"]
    assert summary["stages"][-1]["validation"]["loss"] == trained < summary["stages"][-2]["validation"]["loss"]


def test_what_a_stage_rounds_while_it_trains_is_what_it_stores(tmp_path):
    file = write(tmp_path)
    settings = 'components="norm,experts", qat="int4-channel,experts=int8"'
    text = file.read_text().replace('components="router,norm", teacher_weight=0.5', settings)
    file.write_text(text.replace("evaluate_every=100", "evaluate_every=4"))
    assert _reduce(file, tmp_path / "run", "--config.order=recover_50") == 0
    place = tmp_path / "run/01-recover_50"
    found = trees.flatten(moe_reduce.load(place / "model").params)
    schemes = {path: str(leaf.scheme) for path, leaf in found.items() if is_quantised(leaf)}
    assert schemes["layers/experts/up"] == "int8"
    assert schemes["layers/attention/query"] == "int4-channel"
    assert "layers/router/weight" not in schemes
    summary, trained = json.loads((place / "summary.json").read_text()), metrics(place, "validation")[-1]["loss"]
    stored = summary["validation"]["loss"]
    assert stored == pytest.approx(trained, rel=1e-5), "evaluation during training is that of the stored model"
    tensors = load_file(place / "model/model.safetensors")
    assert summary["bytes"] == sum(x.nbytes for x in tensors.values()) < 4 * summary["parameters"]


def test_each_stage_reads_text_of_its_own(finished, tmp_path):
    """Two stages that change next to nothing, on different text, which is the same in another reduction."""
    file = tmp_path / "config.py"
    stage = 'defaults.stage("tune", steps=3, learning_rate=1e-9, final_learning_rate=0.0)'
    start, end = (finished / "config.py").read_text().split("config.update(defaults.in_order({")
    end = end[end.index("}))") :]
    file.write_text(f'{start}config.update(defaults.in_order({{"first": {stage}, "second": {stage}{end}')
    for workdir, order in (("one", "first,second"), ("two", "second")):
        assert _reduce(file, tmp_path / workdir, f"--config.order={order}") == 0
    first, second, alone = (losses(tmp_path / place) for place in ("one/01-first", "one/02-second", "two/01-second"))
    assert np.max(np.abs(first - second)) > 1e-3
    np.testing.assert_allclose(second, alone, rtol=1e-5)


def test_variants_share_what_they_begin_with(finished, tmp_path, capsys):
    """A variant links the stages that a variant beside it has done from the same beginning, and no others."""
    file = finished / "config.py"
    assert _reduce(file, tmp_path / "one", "--config.order=pool,anneal") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    capsys.readouterr()
    assert _reduce(file, tmp_path / "two", "--config.order=pool,anneal,prune_50") == 0
    out = capsys.readouterr().out
    assert "01-pool is that of" in out
    assert "02-anneal is that of" in out
    assert "03-prune_50 is that of" not in out
    left, right = (moe_reduce.load(place / "03-prune_50/model") for place in (finished / "run", tmp_path / "two"))
    assert_close(left.params, right.params)
    assert _reduce(file, tmp_path / "three", "--config.order=pool,anneal", "--config.stages.anneal.bias_from=3.0") == 0
    out = capsys.readouterr().out
    assert "01-pool is that of" in out
    assert "02-anneal is that of" not in out
    rewritten = json.loads((tmp_path / "one/01-pool/model/manifest.json").read_text())
    rewritten["chain"][-1]["inputs"][0]["sha256"] = "of another model that lay there"
    for name in ("one", "other", "two", "three"):
        (tmp_path / name / "01-pool/model/manifest.json").write_text(json.dumps(rewritten))
    assert _reduce(file, tmp_path / "four", "--config.order=pool") == 0
    assert "is that of" not in capsys.readouterr().out


def test_a_pool_knows_its_layers_when_some_were_dropped(tmp_path):
    """Before pooling, or behind it; and where there is only one."""
    config = dataclasses.replace(MODELS["layer"], layers=4)
    moe_reduce.save(Model(config, init_params(config, jax.random.key(0)), ExecutionConfig()), tmp_path / "4")
    for command, before, after, *more in (
        ("drop-layers", "4", "3", "--layers=1"),
        ("pool", "3", "3-pool"),
        ("pool", "4", "4-pool"),
        ("drop-layers", "4-pool", "4-pool-3", "--layers=1"),
        ("drop-layers", "3", "1", "--layers=0,2"),
        ("pool", "1", "1-pool"),
    ):
        assert main([command, f"--model={tmp_path / before}", f"--out={tmp_path / after}", *more]) == 0
    own = np.eye(4, dtype=bool).repeat(4, axis=1)
    for name, wanted in (
        ("3-pool", np.eye(3, dtype=bool).repeat(4, axis=1)),
        ("4-pool", own),
        ("4-pool-3", own[[0, 2, 3]]),
        ("1-pool", np.ones((1, 4), bool)),
    ):
        model = moe_reduce.load(tmp_path / name)
        np.testing.assert_array_equal(~annealing.foreign_experts(model.config, model.chain), wanted, err_msg=name)


def test_a_pool_of_unknown_origin_is_refused_before_anything_is_measured(tmp_path, capsys):
    """A pool that was trained as one has no layer to favour: nothing to anneal."""
    file = write(tmp_path)
    made = Model(MODELS["pool"], init_params(MODELS["pool"], jax.random.key(0)), ExecutionConfig())
    moe_reduce.save(made, tmp_path / "model", overwrite=True)
    assert _reduce(file, tmp_path / "run", "--config.order=anneal") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "which layer each expert" in line
    assert not (tmp_path / "run/00-original").exists()


def test_protection_of_a_pool_ends_with_the_first_layers(tmp_path, monkeypatch):
    """As `prune --protect-super-experts` does, in a stage."""
    config = dataclasses.replace(MODELS["layer"], layers=4)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=64, width=2))
    moe_reduce.save(Model(config, init_params(config, jax.random.key(0)), ExecutionConfig()), tmp_path / "4")
    assert main(["pool", f"--model={tmp_path / '4'}", f"--out={tmp_path / 'pool'}"]) == 0
    maximum = np.ones((4, 256), np.float32)
    maximum[:, 64 + 7], maximum[:, 3 * 64 + 5] = 50.0, 90.0
    worth = np.where(maximum > 1, np.float32(0), np.float32(1))
    found = scores.Sums(1, np.ones((4, 256), np.float32), worth, worth, worth, maximum, maximum)
    monkeypatch.setattr(scores, "collect", lambda *_: found)
    monkeypatch.setattr(scoring, "calibration", lambda *_: None)
    (run,) = config_file.read(str(write(tmp_path)), [], reduce_from_dict).values()
    place: Any = SimpleNamespace(run=run, name="prune", mesh=None, first=config, directory=tmp_path)
    stage = PruneStage(keep=0.5, protect_super_experts=True)
    (kept,) = stages.run_stage(stage, moe_reduce.load(tmp_path / "pool"), place).kept_experts
    assert [pair for pair in kept if pair in ([1, 7], [3, 5])] == [[1, 7]]


def test_another_configuration_is_refused(finished, capsys):
    assert _reduce(finished / "config.py", finished / "run", "--config.stages.prune_50.keep=0.75") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "belongs to another configuration" in line
    assert "stages.prune_50.keep" in line


def test_another_model_in_the_same_place_is_refused(finished, tmp_path, capsys):
    """Where a run is done as well as where it goes on: its figures are those of the model that it began with."""
    model, aside, run = finished / "model", tmp_path / "aside", tmp_path / "run"
    shutil.copytree(finished / "run", run)
    changed = moe_reduce.load(model)
    final_norm = {"final_norm": {"scale": changed.params["final_norm"]["scale"] * 2}}
    model.rename(aside)
    try:
        moe_reduce.save(dataclasses.replace(changed, params=changed.params | final_norm), model)
        for unfinished in (False, True):
            if unfinished:
                (run / "summary.json").unlink()
            capsys.readouterr()
            assert _reduce(finished / "config.py", run) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"model={model} is another one than --workdir={run} began with" in line
    finally:
        shutil.rmtree(model)
        aside.rename(model)
    assert _reduce(finished / "config.py", run) == 0


def test_architectures_of_the_stages_are_those_of_the_models(finished):
    (run,) = config_file.read(str(finished / "config.py"), [], reduce_from_dict).values()
    first = moe_reduce.load(finished / "model").config
    for number, (name, config) in enumerate(stages.configurations(first, run), start=1):
        assert moe_reduce.load(finished / f"run/{number:02d}-{name}/model").config == config


def test_an_adapter_that_a_mesh_cannot_split_is_refused(finished):
    file = str(finished / "config.py")
    (run,) = config_file.read(file, [], reduce_from_dict).values()
    first = moe_reduce.load(finished / "model").config
    adapter = AdapterConfig(method="skema", sketch_width=4, targets="mlp", projection="srht")
    entry = TuneStage(steps=1, components="router", adapter=adapter)
    with pytest.raises(UserError, match=r"stages.t: adapter.projection=srht mixes the whole width"):
        list(stages.configurations(first, dataclasses.replace(run, stages={"t": entry}, mesh=MeshConfig(tensor=2))))
