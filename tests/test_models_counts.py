"""Exact parameter counts by component from abstract initialisation, and FLOPs per token."""

import jax
import jax.numpy as jnp
import pytest

from moe_reduce.commands import config_file
from moe_reduce.core.config import ModelConfig, reduce_from_dict
from moe_reduce.core.errors import UserError
from moe_reduce.models.decoder import init_params
from moe_reduce.models.parameters import abstract_params, counts_by_component, parameter_count, records
from moe_reduce.planning.flops import (
    active_parameters,
    forward_flops_per_token,
    matmul_parameters_per_token,
    train_flops_per_token,
)
from moe_reduce.reduction.transform import expert_count
from moe_reduce.runs import stages

PYTHIA_160M = ModelConfig(
    vocab_size=50_304, layers=12, width=768, query_heads=12, key_value_heads=12, head_width=64, feed_forward_width=3072,
    tied_embeddings=False, norm="layer", norm_epsilon=1e-5, biases=True, parallel_residual=True, feed_forward="gelu",
    rotary_share=0.25,
)  # fmt: skip


def _model(name):
    (run,) = config_file.read(f"configs/{name}.py", []).values()
    return run.model


def test_shared_moe_50m():
    model = _model("shared_moe_50m")
    assert counts_by_component(model) == {
        "attention": 12 * (2 * 768**2 + 2 * 768 * 256),
        "embedding": 4_096_000 + 98_304,
        "experts": 16 * 3 * 768 * 720,
        "norm": 25 * 768,
        "router": 16 * 768,
    }
    assert parameter_count(model) == 49_642_240


def test_dense_llama_125m():
    model = _model("dense_llama_125m")
    assert parameter_count(model) == 137_841_408
    assert counts_by_component(model)["feed_forward"] == 12 * 3 * 768 * 3072


def test_pythia_160m():
    model = PYTHIA_160M
    assert counts_by_component(model) == {
        "attention": 12 * 4 * 768**2,
        "bias": 12 * (4 * 768 + 3072 + 768),
        "embedding": 50_304 * 768,
        "feed_forward": 12 * 2 * 768 * 3072,
        "norm": 25 * 2 * 768,
        "unembedding": 50_304 * 768,
    }
    assert parameter_count(model) == active_parameters(model) == 162_322_944
    assert matmul_parameters_per_token(PYTHIA_160M) == 12 * 12 * 768**2 + 50_304 * 768


def test_qwen3_30b_a3b_as_a_pool_and_pruned():
    runs = config_file.read("configs/qwen3_30b_a3b_global.py", [], reduce_from_dict)
    run = runs["lossless_start"]
    assert run.architecture is not None
    found = {"original": run.architecture} | dict(stages.configurations(run.architecture, run))
    counts = {name: counts_by_component(config) for name, config in found.items()}
    one = 3 * 2048 * 768
    assert expert_count(found["pool"]) == 6144
    assert counts["original"] == {
        "attention": 48 * 2 * 2048 * 128 * (32 + 4),
        "embedding": 151_936 * 2048,
        "experts": 6144 * one,
        "norm": 48 * (2 * 2048 + 2 * 128) + 2048,
        "router": 48 * 2048 * 128,
        "unembedding": 151_936 * 2048,
    }
    assert sum(counts["original"].values()) == 30_532_122_624
    assert active_parameters(run.architecture) == 3_353_032_704
    pooled = {"router": 2048 * 6144, "router_bias": 48 * 6144}
    assert counts["pool"] == dict(sorted((counts["original"] | pooled).items()))
    for name, experts in (("prune_1200", 1200), ("prune_600", 600)):
        smaller = {"experts": experts * one, "router": 2048 * experts, "router_bias": 48 * experts}
        assert counts[name] == dict(sorted((counts["pool"] | smaller).items()))
    assert sum(counts["prune_1200"].values()) == 7_193_336_064
    assert sum(counts["prune_600"].values()) == 4_360_923_264


def test_abstract_equals_real(tiny_shared):
    abstract, real = abstract_params(tiny_shared), init_params(tiny_shared, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, real)


def test_a_parameter_without_a_record_is_refused(tiny_shared):
    with pytest.raises(UserError, match="layers/surprise"):
        records(tiny_shared, {"layers": {"surprise": jnp.ones(2)}})
    with pytest.raises(UserError, match="adapter/layers/surprise/scale belongs to no parameter"):
        records(tiny_shared, {"adapter": {"layers": {"surprise": {"scale": jnp.ones(2)}}}})


def test_flops_by_hand():
    model = _model("dense_llama_125m")
    matmul = 12 * (4 * 768 * 768 + 3 * 768 * 3072) + 32_000 * 768
    attention = 2 * 2 * 12 * 768 * (1024 + 1) / 2  # scores and mixing, over half the context on average
    assert forward_flops_per_token(model, 1024) == 2 * matmul + attention
    assert train_flops_per_token(model, 1024) == 3 * (2 * matmul + attention)


def test_pool_counts_once_a_layer_call():
    model = _model("shared_moe_50m")
    active = 12 * (2 * 3 * 768 * 720 + 768 * 16 + 2 * 768 * 64 * (12 + 4)) + 128 * (32_000 + 768)
    assert matmul_parameters_per_token(model) == active
