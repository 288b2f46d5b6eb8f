"""Eight devices compute what one does, and two processes what one does: to the rounding of fp32.

The sums over a batch and over experts are taken in another order on each mesh, so losses differ in the last bits
(eps is 6e-8): 9e-7 of the loss and 1e-6 of a parameter were the most seen in 20 steps. Parameters get more room:
Adam divides by the size of a gradient, and so enlarges the rounding of one that is nearly zero.
"""

import dataclasses
import json
import shutil
import socket
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file
from training_runs import command, environment, losses, metrics, run_config, token_data, unmeasured_peak, write_config

from moe_reduce.commands import config_file
from moe_reduce.core import config
from moe_reduce.core.config import MeshConfig
from moe_reduce.runs.train import train
from moe_reduce.training import job

LOSS = {"rtol": 5e-6}
PARAMETERS = {"rtol": 1e-4, "atol": 1e-5}
GOLDEN = {
    "dense": [5.855057, 5.850702, 5.823055, 5.781961, 5.737825],
    "shared": [5.859765, 5.862430, 5.847830, 5.770968, 5.721968],
}
MESHES = {
    "dense": ["data=8", "data=2 fsdp=4", "data=4 tensor=2", "data=2 fsdp=2 tensor=2"],
    "shared": ["data=8", "data=2 fsdp=4", "data=2 fsdp=2 expert=2", "data=2 expert=2 tensor=2"],
}
IN_OTHERS = ("data=8",)  # the other meshes split batches too


def parameters(workdir):
    return load_file(workdir / "model/model.safetensors")


def assert_same_run(found, expected):
    assert len(losses(expected)) == 20
    np.testing.assert_allclose(losses(found), losses(expected), **LOSS)
    for split in ("train", "validation"):
        ours, theirs = metrics(found, split), metrics(expected, split)
        assert [(line["step"], sorted(line)) for line in ours] == [(line["step"], sorted(line)) for line in theirs]
        for name in ("gradient_norm", "balance_pooled", "balance_per_call") if "router_z" in theirs[0] else ():
            np.testing.assert_allclose([x[name] for x in ours], [x[name] for x in theirs], rtol=1e-3, err_msg=name)
    ours, theirs = parameters(found), parameters(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, err_msg=name, **PARAMETERS)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """Workdirs of the runs on one device, by kind of model, made when asked for."""
    directory = tmp_path_factory.mktemp("one")
    data = token_data(directory)

    def workdir(kind):
        if not (directory / kind).exists():
            train(run_config(kind, data), directory / kind)
        return directory / kind

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "peak", unmeasured_peak)
        yield workdir


@pytest.mark.parametrize("kind", MESHES)
def test_first_losses_are_the_golden_ones(on_one_device, kind):
    # whoever changes them on purpose (initialisation, order of the data) puts the new numbers here
    np.testing.assert_allclose(losses(on_one_device(kind))[:5], GOLDEN[kind], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=[pytest.mark.slow] * (shape in IN_OTHERS))
        for kind, shapes in MESHES.items()
        for shape in shapes
    ],
)
def test_eight_devices_compute_what_one_does(on_one_device, tmp_path, kind, shape):
    mesh = MeshConfig(**{"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in shape.split())})
    expected = on_one_device(kind)
    train(run_config(kind, token_data(tmp_path), mesh), tmp_path / "run")
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [pytest.param("dense", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow), ("shared", {"expert": 2, "tensor": 2})],
)
def test_bf16_products_go_over_a_mesh(tmp_path, kind, mesh):
    """Where nothing pins their operands in memory, as on one device."""
    single = run_config(kind, token_data(tmp_path), steps=4)
    half = dataclasses.replace(single, execution=dataclasses.replace(single.execution, compute_dtype="bfloat16"))
    train(half, tmp_path / "one")
    train(dataclasses.replace(half, mesh=MeshConfig(data=2, **mesh)), tmp_path / "many")
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=2e-3)


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory):
    """The directory of two runs by two processes of two devices: rows over the processes, and experts over them."""
    directory = tmp_path_factory.mktemp("two")
    changes = {"rows": {"mesh": {"data": 4}}, "experts": {"mesh": {"expert": 2, "tensor": 2}}}
    file = write_config(directory, token_data(directory), variants=changes, train={"checkpoint_every": 15})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [f"--config={file}", f"--workdir={directory / 'run'}", f"--coordinator={address}", "--processes=2"]
    started = [
        subprocess.Popen(
            command(*arguments, f"--process={process}"),
            env=environment(devices=2, cache=directory / "compiled"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert outputs[0].splitlines()[-1] == str(directory / "run/summary.json")
    return directory


@pytest.mark.parametrize("variant", ["rows", "experts"])
def test_two_processes_compute_what_one_does(by_two_processes, on_one_device, variant):
    assert_same_run(by_two_processes / "run" / variant, on_one_device("shared"))


def test_the_first_process_alone_writes(by_two_processes):
    workdir = by_two_processes / "run/rows"
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert sorted(step.name for step in (workdir / "checkpoints").iterdir()) == ["15", "20"]
    assert "4 × cpu" in json.loads((workdir / "summary.json").read_text())["machine"]


@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 1, "fsdp": 2, "expert": 2}, {"data": 1}])
def test_one_process_goes_on_over_another_mesh(by_two_processes, on_one_device, tmp_path, mesh, capsys):
    shutil.copytree(by_two_processes / "run/rows", tmp_path / "rows")
    for rest in ("summary.json", "model", "checkpoints/20"):
        path = tmp_path / "rows" / rest
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    variants = config_file.read(str(by_two_processes / "config.py"), [])
    assert variants["rows"] == config.run_from_dict(config.to_dict(variants["rows"]))
    train(dataclasses.replace(variants["rows"], mesh=MeshConfig(**mesh)), tmp_path / "rows")
    assert "after step 15 of" in capsys.readouterr().out
    assert_same_run(tmp_path / "rows", on_one_device("shared"))
