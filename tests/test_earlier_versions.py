"""Files that commit 885cb00 wrote: its models open, its run resumes, and its configuration file is read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from training_runs import metrics, unmeasured_peak

import moe_reduce
from moe_reduce.__main__ import main
from moe_reduce.core.provenance import home_layers, originals
from moe_reduce.storage import manifest
from moe_reduce.training import job
from moe_reduce.training.metrics import TIMING

WRITTEN = Path(__file__).parent / "fixtures/before_rebuild"
TOLERANCE = 1e-6  # relative; equal bit for bit on the machine that wrote them


@pytest.fixture
def resumed(tmp_path, monkeypatch, capfd):
    """A copy of the killed run, far from where it was written, after `train` was called again."""
    shutil.copytree(WRITTEN, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(job, "peak", unmeasured_peak)
    assert main(["train", "--config=config.py", "--workdir=stopped"]) == 0
    return tmp_path / "copy/stopped", capfd.readouterr().out


def numbers(lines):
    return [{name: value for name, value in line.items() if name not in (*TIMING, "split")} for line in lines]


def test_the_run_resumes_behind_its_checkpoint_and_ends_as_if_never_stopped(resumed):
    workdir, printed = resumed
    assert "step 4" in printed
    expected = json.loads((WRITTEN / "finished/summary.json").read_text())
    found = json.loads((workdir / "summary.json").read_text())
    assert found["validation"] == pytest.approx(expected["validation"], rel=TOLERANCE)
    for split in ("train", "validation"):
        ours, theirs = (numbers(metrics(run, split)) for run in (workdir, WRITTEN / "finished"))
        assert len(ours) == len(theirs) > 0
        for line, wanted in zip(ours, theirs, strict=True):
            assert line == pytest.approx(wanted, rel=TOLERANCE)
    assert set(expected) <= set(found)


@pytest.mark.parametrize("directory", ["finished/model", "pruned"])
def test_models_open_and_give_the_same_logits(directory):
    name = {"finished/model": "finished/logits.npy", "pruned": "pruned_logits.npy"}[directory]
    logits = moe_reduce.load(WRITTEN / directory)(np.load(WRITTEN / "tokens.npy")[:2])
    np.testing.assert_allclose(logits, np.load(WRITTEN / name), rtol=1e-5, atol=1e-5)


def test_the_chain_of_a_pruned_pool_is_read():
    chain = manifest.read_chain(WRITTEN / "pruned")
    assert [step.command for step in chain] == ["train", "pool", "prune"]
    assert [step.parameters_after for step in chain] == [3064, 3080, 2272]
    config = moe_reduce.load(WRITTEN / "pruned").config
    (kept,) = originals(config, chain)
    assert len(kept) == config.moe.experts == 4
    np.testing.assert_array_equal(home_layers(config, chain), [[layer for layer, _ in kept]])
