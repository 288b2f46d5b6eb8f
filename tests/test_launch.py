"""Every configuration builds abstractly, every script parses, and the benchmark script runs."""

import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_reduce.__main__ import main
from moe_reduce.adapters.adapter import abstract, trained_parameters
from moe_reduce.adapters.budget import within_budget
from moe_reduce.commands import config_file
from moe_reduce.core import trees
from moe_reduce.core.config import AdaptConfig, ModelConfig, RunConfig, any_from_dict, text_to_lora_from_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.stages import TuneStage
from moe_reduce.models.parameters import abstract_params, by_path, parameter_count
from moe_reduce.reduction.transform import expert_count
from moe_reduce.runs.stages import configurations
from moe_reduce.training import optimizer

cached_abstract_params = functools.cache(abstract_params)  # variants share many architectures
ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))
FOR_ANY_MODEL = (
    "adapt", "adapt_profiles", "adapt_smollm2_uuid", "adapt_smollm2_wikitext2", "qlora_smollm2", "reduce",
)  # fmt: skip


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_builds_abstractly(file):
    if file.stem.startswith("text_to_lora"):  # makes no architecture: its base is on disk
        given = ["--config.tasks.directory=any", "--config.model=any"]
        assert config_file.read(str(file), given, text_to_lora_from_dict)
        return
    given = ["--config.model=runs/small_qwen3_moe/model"] if file.stem in FOR_ANY_MODEL else []
    runs = config_file.read(str(file), given, any_from_dict)
    assert runs
    for run in runs.values():
        for model, train in _models(run):
            params = cached_abstract_params(model)
            assert trees.size(params) == parameter_count(model)
            optimizer.build(train.over(sequences=10_000), params, by_path(model))
            run.mesh.check_fits(model)


def _models(run):
    """Every architecture that a run makes, and a schedule that trains it."""
    if isinstance(run, RunConfig):
        return [(run.model, run.train)]
    trained = _trained(Path(run.model))
    if isinstance(run, AdaptConfig):  # of the same base
        chosen = run.adapter
        if chosen is not None and run.budget is not None:
            allowed = int(run.budget * parameter_count(trained.model))
            chosen = within_budget(chosen, trained.model, allowed)
            assert trees.size(abstract(chosen, trained.model)) > 0
        return [(trained.model, run.train)]
    first = run.architecture or trained.model
    schedules = [stage.schedule(run.train) for stage in run.stages.values() if isinstance(stage, TuneStage)]
    train = (schedules or [trained.train])[0]
    return [(config, train) for config in [first, *(config for _, config in configurations(first, run))]]


def _trained(model):
    """The run that made a model directory: runs/NAME/model, or a variant's, runs/quickstart/models/VARIANT/model."""
    if model.parts[:2] == ("runs", "quickstart"):
        return config_file.read("quickstart_models", [])[model.parts[-2]]
    named = model.parent.name if (ROOT / f"configs/{model.parent.name}.py").exists() else "small_qwen3_moe"
    (trained,) = config_file.read(named, []).values()
    return trained


def test_profiles_of_adapters():
    """Sketch widths k and matrices of the three sizes, and what they train on the shape of Pythia-160M."""
    runs = config_file.read("adapt_profiles", ["--config.model=any"], any_from_dict)
    assert list(runs) == ["balanced", "light", "quality"]
    pythia = ModelConfig(
        vocab_size=50_304, layers=12, width=768, query_heads=12, key_value_heads=12, head_width=64,
        feed_forward_width=2048,
    )  # fmt: skip
    ranges = {"light": (128, 256, 3), "balanced": (256, 512, 6), "quality": (512, 1024, 7)}
    for name, (least, most, matrices) in ranges.items():
        adapter = runs[name].adapter
        assert least <= adapter.sketch_width <= most
        assert (adapter.method, adapter.layers, runs[name].budget) == ("skema", "all", None)
        assert trained_parameters(adapter, pythia) == 12 * matrices * adapter.sketch_width**2


@pytest.mark.parametrize("order", ["prune,recover", "pool,anneal,prune,recover"])
@pytest.mark.parametrize(("layers", "experts"), [(4, 16), (6, 40), (48, 128)])
def test_reduce_halves_the_experts_of_any_mixture(order, layers, experts):
    (run,) = config_file.read("reduce", ["--config.model=any", f"--config.order={order}"], any_from_dict).values()
    first = replace(_trained(Path("runs/small_qwen3_moe/model")).model, layers=layers)
    first = replace(first, moe=replace(first.moe, experts=experts))
    *_, (_, last) = configurations(first, run)
    assert expert_count(last) == expert_count(first) // 2


def test_own_configs_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cpu_pair", "cpu_pair.py", "configs/cpu_pair.py"):
        assert set(config_file.read(name, [])) == {"dense", "shared_moe"}
    with pytest.raises(UserError, match=r"--config=other.py does not exist: name a file, or one .*cpu_pair, "):
        config_file.read("other.py", [])


def test_a_config_elsewhere_imports_its_neighbours_and_the_projects_own(tmp_path, monkeypatch):
    mine = tmp_path / "configs"
    mine.mkdir()
    (mine / "__init__.py").touch()
    (mine / "neighbour.py").write_text("STEPS = 700\n")
    (mine / "mine.py").write_text(
        "from configs import cpu_pair, neighbour\n"
        "def get_config():\n"
        "    config = cpu_pair.get_config()\n"
        "    config.train.steps = neighbour.STEPS\n"
        "    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    assert {run.train.steps for run in config_file.read("configs/mine.py", []).values()} == {700}
    assert not [name for name in sys.modules if name.startswith("configs.")]


def test_configs_are_installed_with_the_package(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert "configs" in found["packages"]
    assert not [name for name in found["extras_require"]["test-core"] if name.startswith(("torch", "transformers"))]


def test_every_extra_that_is_named_can_be_installed(monkeypatch):
    """The package is not on PyPI, so that extras are installed from the checkout."""
    setuptools = pytest.importorskip("setuptools")
    known = {}
    monkeypatch.setattr(setuptools, "setup", known.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.*"), *ROOT.glob("moe_reduce/**/*.py")]
    named = [found for file in files for found in re.findall(r"install -e '([^'\[]*)\[([\w-]+)\]'", file.read_text())]
    assert len(named) > 5
    assert {(place, extra) for place, extra in named if place != "." or extra not in known["extras_require"]} <= {
        (".", "NAME")
    }
    assert [file for file in files if "moe_reduce[" in file.read_text()] == []
    listed = (ROOT / "README.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()
    assert [extra for extra in known["extras_require"] if not all(f"`{extra}`" in page for page in listed)] == []


def test_help_of_a_benchmark_is_its_whole_description(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    side_by_side = importlib.import_module("side_by_side")
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        side_by_side.options("First line.\n\nCommand: ./bench\n", "result", repeats=3)
    assert "First line.\n\nCommand: ./bench\n" in capsys.readouterr().out


def test_no_file_names_a_text_that_only_its_authors_have():
    searched = [ROOT / "README.md", ROOT / "setup.py"]
    for directory in ("configs", "docs", "launch", "moe_reduce", "notebooks"):
        searched += [file for kind in ("py", "sh", "md", "ipynb") for file in (ROOT / directory).rglob(f"*.{kind}")]
    assert len(searched) > 100
    assert [file for file in searched if "../shared" in file.read_text()] == []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_source_is_public(file):
    """A fresh clone has no files of text, so that sources are made, generated or on the hub."""
    if file.stem.startswith("text_to_lora"):  # the directory of tasks is always given
        assert "directory=" not in file.read_text().split('"""')[2]
        return
    given = ["--config.model=any"] if file.stem in FOR_ANY_MODEL else []
    for run in config_file.read(str(file), given, any_from_dict).values():
        named = [run.data.source, run.data.validation_source, getattr(run, "test_source", None)]
        assert all(source.startswith(("hub:", "python-stdlib", "uuid-pairs:")) for source in named if source)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_says_what_it_costs(file):
    docstring = file.read_text().split('"""')[1]
    for word in ("Cost:", "Expected:", "Command:"):
        assert word in docstring


@pytest.mark.parametrize("pair", ["cpu_pair", "cpu_pair_large"])
def test_shared_moe_has_at_most_40_percent(pair):
    runs = config_file.read(str(ROOT / "configs" / f"{pair}.py"), [])
    sizes = {name: parameter_count(run.model) for name, run in runs.items()}
    assert sizes["shared_moe"] <= 0.4 * sizes["dense"]


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda script: script.name)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "document", ["shared_moe", "reduction", "adapters", "speed", "scale", "benchmarks", "quantisation"]
)
def test_tables_of_documents_are_the_generated_ones(document):
    results = ROOT / "docs/results"
    assert main(["report", f"--document={results / document}.md", f"--results={results}", "--check"]) == 0


def test_the_mixtures_of_equal_architecture_have_equal_parameters(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    import bench_train
    import torch
    import transformers

    (run,) = config_file.read(str(ROOT / "configs/shared_moe_50m.py"), ["--config.model.layers=2"]).values()
    model = bench_train.with_own_experts(run.model)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(bench_train.peer_config(model))
    assert parameter_count(model) == sum(leaf.numel() for leaf in peer.parameters())
    assert parameter_count(run.model) < parameter_count(model), "the shared pool is smaller than its peer"


@pytest.mark.slow
def test_benchmark_runs(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "launch" / "bench_train.py", "--tiny", f"--out={tmp_path}"],
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(row["ratio"] > 0 for row in summary["steps"])
    assert all(len(row) == len(summary["columns"]) for row in summary["rows"])
    assert len(summary["steps"]) == 6
    assert summary["steps"][4]["our_parameters"] > summary["steps"][2]["our_parameters"], "a pool in each layer"
    assert 0 < summary["layer"]["forward_share_of_peak"] < 1.2


@pytest.mark.slow
def test_adapters_benchmark_runs(tmp_path):
    script = [sys.executable, ROOT / "launch" / "bench_adapters.py", "--tiny", f"--out={tmp_path}"]
    subprocess.run(script, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(len(row) == len(summary["columns"]) for row in summary["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peers", "scale", "harness"])
def test_tables_of_benchmarks_are_whole(tmp_path, name):
    script = [sys.executable, ROOT / "launch" / f"bench_{name}.py", "--tiny", f"--out={tmp_path}"]
    subprocess.run(script, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"]
    assert all(len(row) == len(summary["columns"]) for row in summary["rows"])


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "HOME": str(tmp_path)}
    subprocess.run(["bash", ROOT / "launch/gpu_bench.sh", "--tiny", f"--out={tmp_path}"], check=True, env=environment)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(len(row) == len(summary["columns"]) for row in summary["rows"])
    assert summary["failed"] == []
    assert len(summary["training"]) == 2
    assert 0 < summary["routing"]["measured"] < 10
    assert all(0 < one["flops"] < 2 * summary["matmul_peak"] for one in summary["training"].values())
    assert all(0 < difference < 0.1 for one in summary["precision"].values() for difference in one.values())


def test_plans_become_a_table(tmp_path):
    held = {"trained_parameters": 10**9, "optimizer": 2 * 10**9, "frozen_parameters": 4 * 10**9}
    plan = {
        "topology": "v4:2x2x4", "devices": 16, "memory_bytes": 2**35, "mesh": "data=16", "batch": "8 x 8",
        "held_bytes": held,
    }  # fmt: skip
    fits = plan | {
        "fits": True, "share_of_memory": 0.5, "temporaries_bytes": 5 * 10**8, "compile_seconds": 3.0,
        "collectives": {"all-reduce": {"count": 2, "bytes": 2 * 10**9}},
        "estimated_cycles": {"total": 1_234_567_890, "most": {}},
    }  # fmt: skip
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"a": fits, "b": plan | {"fits": False, "remedy": "raise mesh.fsdp"}}))
    subprocess.run([sys.executable, ROOT / "launch/plan_tpu.py", file, f"--out={tmp_path}"], check=True)
    first, second = json.loads((tmp_path / "summary.json").read_text())["rows"]
    bytes_of_a_device = ["3.00 GB", "4.00 GB", "0.50 GB", "50%"]
    assert first == ["a", "data=16", "8 x 8", *bytes_of_a_device, "all-reduce 2.00 GB", "1,235 M", "3 s"]
    assert second[6] == "does not fit: raise mesh.fsdp"


@pytest.mark.slow
def test_generation_benchmark_runs(tmp_path):
    script = [sys.executable, ROOT / "launch" / "bench_generate.py", "--tiny", f"--out={tmp_path}"]
    subprocess.run(script, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert all(len(row) == len(summary["columns"]) for row in summary["rows"])
    exact, half = summary["decoding"]
    assert exact["same_text"]
    assert half["weight_bytes"] * 2 == exact["weight_bytes"]


@pytest.mark.slow
def test_file_benchmark_runs(tmp_path):
    model, out = tmp_path / "model", tmp_path / "summary.json"
    small = ["--layers=2", "--experts=16", "--width=64", "--hidden=32", "--shard-megabytes=1"]
    subprocess.run([sys.executable, ROOT / "launch" / "synthetic_moe.py", model, *small], check=True)
    script = [sys.executable, ROOT / "launch" / "bench_files.py"]
    subprocess.run([*script, f"--model={model}", "--repeats=1", f"--out={out}"], check=True)
    summary = json.loads(out.read_text())
    assert summary["prune"]["kept_bytes"] > 0
    assert all(len(row) == len(summary["columns"]) for row in summary["rows"])
