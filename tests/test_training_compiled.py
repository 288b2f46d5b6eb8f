"""What a step takes on devices that are not here: bytes by kind, collectives, whether it fits, and what would help."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from training_runs import MODELS, run_config, token_data

from moe_reduce.__main__ import main
from moe_reduce.adapters.adapter import abstract
from moe_reduce.core import trees
from moe_reduce.core.config import AdapterConfig, ExecutionConfig, MeshConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.planning import compiled_step, footprint
from moe_reduce.runs.train import pretraining
from moe_reduce.storage.model_directory import save
from moe_reduce.training import sharding

ROOT = Path(__file__).parent.parent
WIDE = {"fsdp": 2, "expert": 2}


def job_of(kind, directory, remat="none", **train):
    run = run_config(kind, token_data(directory), **train)
    execution = dataclasses.replace(run.execution, remat=remat).resolve("cpu")
    return pretraining(dataclasses.replace(run, execution=execution))


def test_collectives_are_counted_with_their_loops():
    mesh = sharding.make_mesh(MeshConfig(data=8))

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False)
    def step(x):
        def layer(carry, _):
            return carry + jax.lax.psum(x, "data"), None

        total = jax.lax.scan(layer, jnp.zeros_like(x), length=5)[0]
        return jnp.sum(jax.lax.all_gather(total, "data"), keepdims=True)

    text = jax.jit(step).lower(jnp.zeros((16, 3))).compile().as_text()
    found = compiled_step.collectives(text)
    assert found["all-gather"] == {"count": 1, "bytes": 8 * 2 * 3 * 4}
    # the sum of x is the same in each turn: the compiler may take it out of the loop
    assert found["all-reduce"]["count"] in (1, 5)
    assert found["all-reduce"]["bytes"] == found["all-reduce"]["count"] * 2 * 3 * 4


HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%y), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %start = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%z), dimensions={0}
  %done = bf16[4,8]{1,0} all-gather-done(%start)
  %fusion.1 = bf16[2,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %once = bf16[4]{0} fusion(%x), calls=%inner.2, metadata={op_name="x/add"}, backend_config={"estimated_cycles":"1847"}
}

%inner.2 (p: bf16[4]) -> bf16[4] {
  ROOT %twice = bf16[4]{0} add(%p, %p), backend_config={"estimated_cycles":"1800"}
}

%all-reduce-scatter.2 (p: bf16[4,8]) -> bf16[2,8] {
  %summed = bf16[4,8]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  ROOT %mine = bf16[2,8]{1,0} dynamic-slice(%summed, %place, %zero), dynamic_slice_sizes={2,8}
}

%condition.1 (state: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner (p: f32[3]) -> f32[3] {
  %exchanged = (f32[3]{0}, s32[1]{0}) all-to-all(%p, %q), dimensions={0}
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %loop = (s32[], bf16[4,8]) while(%start), condition=%condition.1, body=%body.1
  %called = f32[3]{0} fusion(%p), kind=kCustom, calls=%inner
  %copied = f32[3]{0} copy(%p), backend_config={"estimated_cycles":"22995"}
  %added = f32[3]{0} add(%p, %p), metadata={op_name="x/add"}, backend_config={"estimated_cycles":"3"}
}
"""


def test_collectives_of_a_program_by_hand():
    assert compiled_step.collectives(HLO) == {
        "all-gather": {"count": 12, "bytes": 12 * 4 * 8 * 2},
        "all-reduce": {"count": 12, "bytes": 12 * 4 * 8 * 2},
        "reduce-scatter": {"count": 12, "bytes": 12 * 2 * 8 * 2},
        "all-to-all": {"count": 1, "bytes": 3 * 4 + 4},
    }


def test_estimated_cycles_of_a_program_by_hand():
    """By their source, the most first; those of a loop as often as it turns."""
    found = compiled_step.estimated_cycles(HLO)
    assert list(found.items()) == [("copy", 22995), ("x/add", 12 * 1847 + 3)]


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_bytes_are_those_that_a_run_holds(kind, tmp_path):
    """Arguments as the compiler counts them, and as they follow from shapes; three copies of what trains."""
    axes = {"tensor": 2} if kind == "dense" else WIDE
    mesh = sharding.make_mesh(MeshConfig(**axes))
    job = job_of(kind, tmp_path)
    found = compiled_step.compile_step(job, mesh, memory=10**9)
    assert sum(found["held_bytes"].values()) + 4 == pytest.approx(found["arguments_bytes"], rel=0.01)
    assert found["fits"]
    assert found["bytes"] > found["arguments_bytes"]
    assert "all-reduce" in found["collectives"]
    alone = footprint.of(job, sharding.make_mesh(MeshConfig(data=1))).held()
    assert alone["trained_parameters"] == 4 * parameter_count(MODELS[kind])
    assert alone["optimizer"] == pytest.approx(2 * alone["trained_parameters"], abs=64)


def test_a_bf16_step_on_cpus_gathers_nothing(tmp_path):
    """Neither rows nor matrices, which products pin in memory where no mesh splits them."""
    run = run_config("dense", token_data(tmp_path))
    execution = dataclasses.replace(run.execution, compute_dtype="bfloat16").resolve("cpu")
    job = pretraining(dataclasses.replace(run, execution=execution))
    found = compiled_step.compile_step(job, sharding.make_mesh(MeshConfig(data=2, tensor=2)), memory=10**9)
    assert list(found["collectives"]) == ["all-reduce"]


def test_activations_follow_rows_and_rematerialisation(tmp_path):
    mesh = sharding.make_mesh(MeshConfig(data=1))
    kept = {}
    for remat in ("none", "dots", "full"):
        sizes = [footprint.of(job_of("dense", tmp_path, remat, batch_size=b), mesh).estimate() for b in (8, 16)]
        assert sizes[1]["activations"] == 2 * sizes[0]["activations"]
        kept[remat] = sizes[0]["activations"]
    assert kept["none"] > kept["dots"] > kept["full"]
    # beside `full`: outputs of query, key, value, output, gate and up of both layers (that of down is only added up)
    outputs = 2 * 8 * 32 * (16 + 8 + 8 + 16 + 32 + 32) * 4
    assert kept["dots"] - kept["full"] == outputs


def test_a_step_that_does_not_fit_says_what_to_change(tmp_path):
    mesh = sharding.make_mesh(MeshConfig(data=2))
    tight = compiled_step.compile_step(job_of("dense", tmp_path, batch_size=16), mesh, memory=10_000)
    assert not tight["fits"]
    assert tight["remedy"].startswith("embedding/table [384, 16] float32 takes ")
    assert tight["remedy"].endswith("raise mesh.tensor")
    long = footprint.of(job_of("dense", tmp_path, batch_size=256), mesh)
    assert long.remedy(10**9).endswith("set execution.remat=dots or full")
    full = footprint.of(job_of("dense", tmp_path, "full", batch_size=256), mesh)
    assert full.remedy(10**9).endswith("raise train.accumulation (now 128 sequences at a time)")


def plan(capsys, *arguments):
    status = main(["plan", "--json", *arguments])
    out, err = capsys.readouterr()
    return status, json.loads(out) if status == 0 else err


def test_gpus_are_summed_up(capsys):
    status, plans = plan(capsys, "--config=configs/dense_llama_125m.py", "--topology=h100:8")
    assert status == 0
    (found,) = plans.values()
    assert found["devices"] == 8
    assert found["estimated_bytes"]["trained_parameters"] == 4 * 137_841_408
    assert found["fits"]


def test_each_stage_of_a_reduction_is_planned(capsys):
    config = ["--config=configs/qwen3_30b_a3b_global.py", "--variant=lossless_start", "--topology=h200:32"]
    status, plans = plan(capsys, *config)
    assert status == 0
    assert list(plans) == [
        f"lossless_start {stage}" for stage in ("anneal", "recover_50_percent", "recover_1200", "recover_600")
    ]
    before, *_, after = plans.values()
    experts = 3 * 2048 * 768 * 2 // 8  # bytes of one expert in bf16, an eighth of them on each device
    lost = before["estimated_bytes"]["frozen_parameters"] - after["estimated_bytes"]["frozen_parameters"]
    assert lost == pytest.approx((6144 - 600) * experts, rel=1e-3)


def test_an_adaptation_is_planned_with_its_adapter_alone_in_the_optimiser(tmp_path, tiny_dense, capsys):
    save(Model(tiny_dense, init_params(tiny_dense, jax.random.key(0)), ExecutionConfig()), tmp_path / "base")
    config = ["--config=configs/adapt_uuid.py", f"--config.model={tmp_path / 'base'}", "--topology=h100:4"]
    name = "lora_100_rate_100"
    status, plans = plan(capsys, *config, f"--variant={name}", f"--config.variants.{name}.budget=0.1")
    assert status == 0, plans
    (found,) = plans.values()
    adapted = trees.size(abstract(AdapterConfig(targets="q,o", rank=6), tiny_dense))
    assert 0 < found["estimated_bytes"]["trained_parameters"] <= 4 * adapted
    assert found["estimated_bytes"]["optimizer"] < 2.1 * found["estimated_bytes"]["trained_parameters"]
    assert found["estimated_bytes"]["frozen_parameters"] == pytest.approx(4 * parameter_count(tiny_dense), rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu: pip install -e '.[tpu]'")
def test_a_step_is_compiled_for_a_slice_that_is_not_here():
    """In a process of its own: the compiler for TPU and the simulated devices of these tests keep apart."""
    arguments = ["plan", "--json", f"--config={ROOT / 'configs/shared_moe_50m.py'}", "--topology=v4:2x2x1"]
    sizes = ["--config.train.batch_size=16", "--config.model.layers=2"]
    words = [sys.executable, "-m", "moe_reduce", *arguments, *sizes]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"XLA_FLAGS": ""})
    (found,) = json.loads(done.stdout).values()
    assert found["fits"]
    assert found["devices"] == 4  # chips, as jax sees them on a TPU VM
    assert found["collectives"]["all-reduce"]["bytes"] > 0
    assert found["estimated_cycles"]["total"] >= sum(found["estimated_cycles"]["most"].values()) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=h100"], "such as h100:8"),
        (["--topology=abacus:8"], "'abacus' is unknown; known: rtx4090"),
        (["--topology=v4:lots"], "such as v4:2x2x4"),
        (["--topology=h100:3", "--config.train.batch_size=8"], "train.batch_size (8)"),
        (["--topology=h100:8", "--variant=other"], "--variant=other is unknown"),
    ],
)
def test_topologies_that_are_refused(capsys, arguments, words):
    status, error = plan(capsys, "--config=configs/dense_llama_125m.py", *arguments)
    assert status == 2
    assert words in error
    assert error.count("\n") == 1


def test_a_stage_that_does_not_train_is_refused(capsys):
    arguments = ["--variant=lossless_start", "--topology=h200:32", "--stage=pool"]
    status, error = plan(capsys, "--config=configs/qwen3_30b_a3b_global.py", *arguments)
    assert status == 2
    assert "--stage=pool trains nothing; stages that do: anneal" in error


def test_tpu_needs_its_compiler(capsys):
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed here")
    status, error = plan(capsys, "--config=configs/dense_llama_125m.py", "--topology=v4:2x2x4")
    assert status == 2
    assert "pip install -e '.[tpu]'" in error
