"""score, prune and pool through the real command line, and what transformers makes of the result."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core import trees
from moe_reduce.core.config import ExecutionConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.reduction import scores
from moe_reduce.reduction.prune import prune
from moe_reduce.storage import manifest
from moe_reduce.storage.tensors import TensorFiles, write_tensors


@pytest.fixture
def directory(tmp_path, tiny_layer_moe):
    """A Qwen3-MoE of 8 experts a layer on disk."""
    moe = dataclasses.replace(tiny_layer_moe.moe, experts=8)
    config = dataclasses.replace(tiny_layer_moe, init_std=0.3, layers=3, moe=moe)
    params = init_params(config, jax.random.key(0))
    moe_reduce.save(Model(config, params, ExecutionConfig()), tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, (12, 16)).astype(np.int32))
    return tmp_path / "model"


def _score(directory, *more):
    out = directory.parent / "scores.json"
    data = [f"--data={directory.parent / 'tokens.npy'}", "--sequence-length=16", "--batch-size=4"]
    assert main(["score", f"--model={directory}", *data, "--criteria=all", f"--out={out}", *more]) == 0
    return out


def _tokens():
    return jax.random.randint(jax.random.key(1), (2, 16), 0, 64)


def test_score_writes_json_arrays_and_pictures(directory, capsys):
    file = _score(directory)
    content = json.loads(file.read_text())
    lines, values = capsys.readouterr().out.splitlines(), np.asarray(content["scores"]["reap"])
    layer, expert = np.unravel_index(np.argmax(values), values.shape)
    assert lines[lines.index("reap") + 1].startswith(f"  highest: layer {layer} expert {expert} ({values.max():.4g}), ")
    names = ("scores.npz", "scores-histogram.png", "scores-map.png", "scores.json")
    assert lines[-2:] == [f"files: {', '.join(str(file.with_name(name)) for name in names)}", str(file)]
    assert (content["tokens"], np.asarray(content["counts"]).sum()) == (12 * 16, 3 * 2 * 12 * 16)
    assert set(content["scores"]) == set(scores.CRITERIA)
    arrays = np.load(file.with_suffix(".npz"))
    np.testing.assert_array_equal(arrays["counts"], content["counts"])
    for name in ("histogram", "map"):
        assert (file.parent / f"scores-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_written_together_or_not_at_all(directory, monkeypatch, capsys):
    file = _score(directory)
    before = {each.name: each.read_bytes() for each in file.parent.glob("scores*")}
    assert set(before) == {"scores.json", "scores.npz", "scores-histogram.png", "scores-map.png"}
    again = ["score", f"--model={directory}", f"--data={file.parent / 'tokens.npy'}", "--sequence-length=16"]
    for name in ("scores.json", "scores.npz"):  # what goes beside is as little overwritten unasked
        capsys.readouterr()
        assert main([*again, f"--out={file}"]) == 2
        assert "--overwrite" in capsys.readouterr().err
        (file.parent / name).unlink()
    for name, content in before.items():
        (file.parent / name).write_bytes(content)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scores, "write", full)
    assert main([*again, f"--out={file}", "--overwrite"]) == 2
    assert {each.name: each.read_bytes() for each in file.parent.glob("*scores*")} == before


def test_prune_by_layer_equals_the_transform_and_opens_in_transformers(directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    file, out = _score(directory), tmp_path / "pruned"
    assert main(["prune", f"--model={directory}", f"--scores={file}", "--keep=0.5", f"--out={out}"]) == 0
    small, model = moe_reduce.load(out), moe_reduce.load(directory)
    reap = np.asarray(json.loads(file.read_text())["scores"]["reap"])
    kept = tuple(tuple(sorted(np.argsort(-row, kind="stable")[:4].tolist())) for row in reap)
    expected = prune(model, kept)
    jax.tree.map(np.testing.assert_array_equal, small.params, expected.params)
    step = small.chain[-1]
    assert step.kept_experts == [[[layer, index] for index in row] for layer, row in enumerate(kept)]
    assert manifest.verify(out) == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.config.num_experts == 4
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(np.asarray(_tokens()).astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(small(_tokens()), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def _biased(model):
    """The model with a selection bias of its own in every layer."""
    moe = dataclasses.replace(model.config.moe, selection_bias=True)
    bias_NE = np.random.default_rng(3).normal(size=(3, 8)).astype(np.float32)
    params = trees.unflatten(trees.flatten(model.params) | {"layers/router_bias": bias_NE})
    return Model(dataclasses.replace(model.config, moe=moe), params, model.execution)


@pytest.mark.parametrize("biased", [False, True])
def test_prune_overall_gives_layers_pools_of_their_own_size(directory, tmp_path, biased):
    if biased:
        moe_reduce.save(_biased(moe_reduce.load(directory)), directory, overwrite=True)
    file, out = _score(directory), tmp_path / "pruned"
    arguments = [f"--model={directory}", f"--scores={file}", "--keep=11", "--scope=global", "--criterion=reap_total"]
    assert main(["prune", *arguments, f"--out={out}"]) == 0
    small = moe_reduce.load(out)
    (kept,) = small.chain[-1].kept_experts
    sizes = [sum(layer == wanted for layer, _ in kept) for wanted in range(3)]
    assert sum(sizes) == 11
    assert min(sizes) >= 2
    assert len(set(sizes)) > 1, "the test wants layers that keep different numbers"
    # the same model, with what is gone out of reach
    model = moe_reduce.load(directory)
    moe = dataclasses.replace(model.config.moe, selection_bias=True)
    own = np.asarray(model.params["layers"]["router_bias"]) if biased else np.zeros((3, 8))
    bias = np.full((3, 8), -1e9, np.float32)
    for layer, index in kept:
        bias[layer, index] = own[layer, index]
    flat = trees.flatten(model.params) | {"layers/router_bias": bias}
    hidden = Model(dataclasses.replace(model.config, moe=moe), trees.unflatten(flat), model.execution)
    np.testing.assert_allclose(small(_tokens()), hidden(_tokens()), rtol=1e-4, atol=1e-4)


def test_prune_overall_again_knows_the_layers_of_the_pool_that_it_made(directory, tmp_path):
    """Each layer still counts by its own mean and keeps its floor, though its experts are in one pool by now."""
    sizes, first = (8, 6, 4), np.ones((3, 8), np.float32)
    for layer, size in enumerate(sizes):
        first[layer, size:] = 0
    # two experts of each layer are worth 3 and the others 1, and outputs differ in size between layers
    second = np.concatenate(
        [scale * np.repeat([3, 1], [2, size - 2]) for scale, size in zip((100, 10, 1), sizes, strict=True)]
    )
    source = directory
    for keep, values, out in ((18, first, "uneven"), (7, second[None].astype(np.float32), "small")):
        scores.write(scores.Scores(1, np.ones_like(values), {"reap": values}), tmp_path / "made_up.json")
        prune_it = ["prune", f"--model={source}", f"--scores={tmp_path / 'made_up.json'}", f"--keep={keep}"]
        assert main([*prune_it, "--scope=global", f"--out={tmp_path / out}"]) == 0
        source = tmp_path / out
    (kept,) = moe_reduce.load(source).chain[-1].kept_experts
    # of a layer's mean: 2 and 0.67, 1.8 and 0.6, 1.5 and 0.5
    assert kept == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_pool_then_score_then_prune_keeps_the_original_names(directory, tmp_path):
    pooled, out = tmp_path / "pooled", tmp_path / "small"
    data = ["--sequence-length=16", f"--data={tmp_path / 'tokens.npy'}"]
    assert main(["pool", f"--model={directory}", f"--out={pooled}", *data]) == 0
    quality = moe_reduce.load(pooled).chain[-1].quality
    assert quality["loss"] == pytest.approx(quality["loss_before"], rel=1e-5)
    file = _score(pooled)
    assert main(["prune", f"--model={pooled}", f"--scores={file}", "--keep=0.25", f"--out={out}"]) == 0
    small = moe_reduce.load(out)
    assert small.config.moe.experts == 6
    (kept,) = small.chain[-1].kept_experts
    reap = np.asarray(json.loads(file.read_text())["scores"]["reap"][0])
    best = sorted(np.argsort(-reap, kind="stable")[:6].tolist())
    assert kept == [[index // 8, index % 8] for index in best]
    source = moe_reduce.load(pooled)
    jax.tree.map(np.testing.assert_array_equal, small.params, prune(source, (tuple(best),)).params)


def test_protection_of_a_pool_ends_with_the_first_layers(tmp_path, tiny_layer_moe):
    """Of two experts that stand out the one of the last layer is not protected, wherever its experts lie."""
    moe = dataclasses.replace(tiny_layer_moe.moe, experts=64, width=2)
    config = dataclasses.replace(tiny_layer_moe, layers=4, moe=moe)
    moe_reduce.save(Model(config, init_params(config, jax.random.key(0)), ExecutionConfig()), tmp_path / "layers")
    assert main(["pool", f"--model={tmp_path / 'layers'}", f"--out={tmp_path / 'pool'}"]) == 0
    maximum = np.ones((4, 64), np.float32)
    maximum[1, 7], maximum[3, 5] = 50.0, 90.0
    reap = np.where(maximum > 1, np.float32(0), np.float32(1))
    for name, rows in (("layers", 4), ("pool", 1)):
        values = {"reap": reap.reshape(rows, -1), "max_activation": maximum.reshape(rows, -1)}
        scores.write(scores.Scores(1, np.ones_like(values["reap"]), values), tmp_path / "made_up.json")
        prune_it = ["prune", f"--model={tmp_path / name}", f"--scores={tmp_path / 'made_up.json'}", "--keep=0.5"]
        assert main([*prune_it, "--protect-super-experts", f"--out={tmp_path / name}-half"]) == 0
        kept = moe_reduce.load(tmp_path / f"{name}-half").chain[-1].kept_experts
        assert [pair for row in kept for pair in row if pair in ([1, 7], [3, 5])] == [[1, 7]]


def test_a_pool_of_bf16_weights_gives_the_same_logits(directory, tmp_path):
    """Copied weights are; folded ones, which --canonical asks for, are rounded once more."""
    model = moe_reduce.load(directory)
    half = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), model.params)
    moe_reduce.save(dataclasses.replace(model, params=half), tmp_path / "half")
    errors = []
    for more in ([], ["--canonical"]):
        assert main(["pool", f"--model={tmp_path / 'half'}", f"--out={tmp_path / 'pool'}", "--overwrite", *more]) == 0
        before, after = (moe_reduce.load(tmp_path / name)(_tokens()) for name in ("half", "pool"))
        errors.append(float(abs(after - before).max() / abs(before).max()))
    assert errors[0] < 1e-5 < 1e-4 < errors[1]


def test_pooling_what_was_pruned_keeps_the_original_names(directory, tmp_path):
    file, half, pooled = _score(directory), tmp_path / "half", tmp_path / "pooled"
    assert main(["prune", f"--model={directory}", f"--scores={file}", "--keep=0.5", f"--out={half}"]) == 0
    assert main(["pool", f"--model={half}", f"--out={pooled}"]) == 0
    before, after = moe_reduce.load(half), moe_reduce.load(pooled)
    assert after.chain[-1].kept_experts == [[pair for row in before.chain[-1].kept_experts for pair in row]]
    np.testing.assert_allclose(after(_tokens()), before(_tokens()), rtol=1e-4, atol=1e-4)


def test_mistakes_leave_nothing_behind(directory, tmp_path, capsys):
    file = _score(directory)
    prune_it = ["prune", f"--model={directory}", f"--scores={file}", f"--out={tmp_path / 'out'}"]
    pool_it = ["pool", f"--model={directory}", f"--out={tmp_path / 'out'}"]
    again = ["score", f"--model={directory}", f"--data={tmp_path / 'tokens.npy'}"]
    for arguments, part in (
        ([*prune_it, "--keep=0"], "--keep"),
        ([*prune_it, "--keep=inf"], "--keep"),
        ([*prune_it, "--keep=0.1"], "fewer than the 2 active"),
        ([*prune_it, "--keep=0.5", "--criterion=raep"], "raep"),
        ([*prune_it, "--keep=0.5", "--floor=3"], "--floor"),
        ([*prune_it, "--keep=0.5", "--scope=global", "--floor=1"], "--floor=1"),
        ([*prune_it, "--keep=0.5", f"--scores={directory / 'config.json'}"], "config.json"),
        ([*pool_it, "--start=best"], "--start"),
        ([*pool_it, "--offset=8"], "sigmoid scores"),
        ([*again, "--criteria=reap,raep", f"--out={tmp_path / 'out.json'}"], "raep"),
        ([*again, f"--out={tmp_path / 'out'}"], "--out"),
        ([*again, f"--out={file.with_suffix('.npz')}", "--overwrite"], "--out"),
        ([*again, f"--out={file}"], "--overwrite"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
    assert not (tmp_path / "out").exists()


def _rewrite_header(file, change):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def _renamed(header):
    header["model.layers.0.mlp.experts.99.gate_proj.weight"] = header.pop(
        "model.layers.0.mlp.experts.3.gate_proj.weight"
    )


def _reshaped(header):
    header["model.layers.0.mlp.experts.3.gate_proj.weight"]["shape"].reverse()


def _retyped(header):
    header["model.layers.0.mlp.experts.3.gate_proj.weight"]["dtype"] = "I32"


def _recast(file, dtype):
    """The same file with one tensor in another dtype; 8 bits are no weight without their scale."""
    files = TensorFiles(file.parent)
    arrays = {name: files.read(name).copy() for name in files.entries}
    wanted = "model.layers.0.mlp.experts.3.gate_proj.weight"
    arrays[wanted] = arrays[wanted].astype(np.dtype(dtype))
    write_tensors(file.parent, [(name, array.shape, array.dtype, array) for name, array in arrays.items()])


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda file: _recast(file, ml_dtypes.float8_e4m3fn), "experts.3.gate_proj"),
        (_truncate, "truncated"),
        (lambda file: _rewrite_header(file, _renamed), "experts.3.gate_proj"),
        (lambda file: _rewrite_header(file, _reshaped), "experts.3.gate_proj"),
        (lambda file: _rewrite_header(file, _retyped), "experts.3.gate_proj"),
    ],
)
def test_damaged_weights_are_refused(directory, tmp_path, capsys, damage, part):
    file = _score(directory)
    damage(directory / "model.safetensors")
    for scope in ("layer", "global"):
        capsys.readouterr()
        prune_it = ["prune", f"--model={directory}", f"--scores={file}", "--keep=0.5", f"--scope={scope}"]
        assert main([*prune_it, f"--out={tmp_path / 'out'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
        assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(directory, tmp_path):
    file, out = _score(directory), tmp_path / "out"
    abandoned, others = (tmp_path / f".out.{socket.gethostname()}.{process}" for process in (999999999, os.getppid()))
    for place in (abandoned, others):
        shutil.copytree(directory, place)
    assert main(["prune", f"--model={directory}", f"--scores={file}", "--keep=1.0", f"--out={out}"]) == 0
    assert not abandoned.exists()
    assert others.exists()
    kept, before = TensorFiles(out), TensorFiles(directory)
    for name in before.entries:
        np.testing.assert_array_equal(kept.read(name), before.read(name))


KILLED = """
import os, signal, sys
from moe_reduce.__main__ import main
from moe_reduce.storage import manifest
manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_a_killed_prune_leaves_nothing_that_looks_like_a_model(directory, tmp_path):
    file, out = _score(directory), tmp_path / "out"
    arguments = ["prune", f"--model={directory}", f"--scores={file}", "--keep=0.5", f"--out={out}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob(".out.*")), "the kill came too early to have left anything"
    assert main(arguments) == 0
    assert not list(tmp_path.glob(".out.*"))
    assert manifest.verify(out) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(directory, tmp_path, capsys):
    file, out = _score(directory), tmp_path / "out"
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # bytes a file; writing more is an OSError
    try:
        assert main(["prune", f"--model={directory}", f"--scores={file}", "--keep=0.5", f"--out={out}"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot write {out}" in line
    assert not out.exists()
    assert not list(tmp_path.glob(".out.*"))


def test_scores_of_another_model_are_refused(directory, tmp_path, capsys):
    file, other = _score(directory), tmp_path / "other"
    assert main(["prune-neurons", f"--model={directory}", "--keep=8", f"--out={other}"]) == 0
    capsys.readouterr()
    assert main(["prune", f"--model={other}", f"--scores={file}", "--keep=0.5", f"--out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"were made for {directory}, and --model={other} is another model" in line


def test_a_link_is_followed_and_what_it_points_to_is_replaced(directory, tmp_path):
    file, real, link = _score(directory), tmp_path / "real/out", tmp_path / "link"
    prune_it = ["prune", f"--model={directory}", f"--scores={file}"]
    assert main([*prune_it, "--keep=1.0", f"--out={real}"]) == 0
    link.symlink_to(real)
    assert main([*prune_it, "--keep=0.5", f"--out={link}", "--overwrite"]) == 0
    assert link.is_symlink()
    assert moe_reduce.load(real).config.moe.experts == 4
    assert [path.name for path in real.parent.iterdir()] == ["out"]


def test_what_a_killed_process_moved_aside_takes_its_name_again(directory, tmp_path, capsys):
    file, out = _score(directory), tmp_path / "out"
    prune_it = ["prune", f"--model={directory}", f"--scores={file}", "--keep=0.5", f"--out={out}"]
    aside = tmp_path / f".out.{socket.gethostname()}.999999999.old"
    shutil.copytree(directory, aside)
    assert main(prune_it) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert moe_reduce.load(out).config.moe.experts == 8
    out.rename(aside)
    assert main([*prune_it, "--overwrite"]) == 0
    assert moe_reduce.load(out).config.moe.experts == 4
    assert not list(tmp_path.glob(".out.*"))


def test_a_model_that_is_broken_is_not_measured(directory, tmp_path, capsys):
    model = moe_reduce.load(directory)
    table = model.params["embedding"]["table"]
    params = trees.update(model.params, {"embedding/table": jnp.full_like(table, jnp.nan)})
    moe_reduce.save(dataclasses.replace(model, params=params), tmp_path / "broken")
    data = [f"--model={tmp_path / 'broken'}", f"--data={tmp_path / 'tokens.npy'}", "--sequence-length=16"]
    for command, part in (("evaluate", "losses of this model are not finite"), ("score", "experts are not finite")):
        capsys.readouterr()
        assert main([command, *data, f"--out={tmp_path / 'out.json'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line
        assert not (tmp_path / "out.json").exists()
