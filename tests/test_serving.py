"""Bytes of serving plans: exact tables, bytes read per decoded token, and changes that make a model fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from moe_reduce.__main__ import main
from moe_reduce.core.config import ExecutionConfig, GenerateConfig, ModelConfig, MoEConfig
from moe_reduce.core.devices import BITS, DEVICES, GIB, device, quantity
from moe_reduce.core.errors import UserError
from moe_reduce.inference import generate as generation
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import counts_by_component
from moe_reduce.planning import formats, serving
from moe_reduce.planning.flops import forward_flops_per_token
from moe_reduce.planning.serving import Serving

QWEN3_8B = ModelConfig(
    vocab_size=151_936, layers=36, width=4096, query_heads=32, key_value_heads=8, head_width=128,
    feed_forward_width=12_288, tied_embeddings=False, qk_norm=True,
)  # fmt: skip
QWEN3_30B = ModelConfig(
    vocab_size=151_936, layers=48, width=2048, query_heads=32, key_value_heads=4, head_width=128,
    moe=MoEConfig(experts=128, active=8, width=768), tied_embeddings=False, qk_norm=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "gigabytes"), [("float32", 28), ("bfloat16", 14), ("int8", 7), ("int4", 3.5), ("ternary", 1.4)]
)
def test_weights_of_seven_billion(dtype, gigabytes):
    assert serving.weight_bytes(7 * 10**9, BITS[dtype]) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("context", "bits", "expected"),
    [
        (32_768, 16, 4.5), (32_768, 8, 2.25), (32_768, 4, 1.125),
        (131_072, 16, 18), (131_072, 8, 9), (131_072, 4, 4.5),
    ],
)  # fmt: skip
def test_cache_of_qwen3_8b(context, bits, expected):
    assert serving.cache_bytes(QWEN3_8B, context, 1, bits) / GIB == expected


def test_cache_of_a_million_tokens():
    assert serving.cache_bytes(QWEN3_8B, 1_000_000, 1, 16) / 1e9 == pytest.approx(147.5, abs=0.05)


def test_decoding_reads_the_experts_that_its_tokens_meet():
    counts = counts_by_component(QWEN3_30B)
    one = 3 * 2048 * 768
    rest = sum(counts.values()) - counts["experts"] - counts["embedding"]
    for batch, met in ((1, 8), (4, 32), (16, 128), (100, 128)):
        found = serving.bytes_read(Serving(QWEN3_30B, context=0, batch=batch))
        assert found == 2 * (rest + 48 * met * one)
    bound = serving.decode_bound(Serving(QWEN3_30B, context=0), device("rtx5090"))
    assert bound == pytest.approx(1.792e12 / (2 * (rest + 48 * 8 * one)))


@pytest.mark.parametrize("card", ["rtx4090", "rtx5090", "v4"])
@pytest.mark.parametrize(("model", "context"), [(QWEN3_8B, 131_072), (QWEN3_30B, 32_768)], ids=["8b", "30b"])
def test_every_remedy_makes_it_fit_and_a_smaller_one_would_not(card, model, context):
    memory = DEVICES[card].memory
    wanted = Serving(model, context)
    assert serving.total(wanted) > memory
    found = serving.remedies(wanted, memory)
    assert found
    sizes = [serving.total(one) for _, one in found]
    assert sizes == sorted(sizes, reverse=True)
    for what, one in found:
        assert serving.total(one) <= memory
        if what.startswith("context="):
            assert serving.total(dataclasses.replace(one, context=one.context + 256)) > memory
        if "experts" in what:
            moe = dataclasses.replace(one.model.moe, experts=one.model.moe.experts + 1)
            larger = dataclasses.replace(one, model=dataclasses.replace(one.model, moe=moe))
            assert serving.total(larger) > memory


def test_nothing_makes_it_fit_a_thimble():
    assert serving.remedies(Serving(QWEN3_8B, 1024), 10**6) == []


def test_two_changes_where_one_is_not_enough():
    found = serving.remedies(Serving(QWEN3_8B, 131_072), 6 * 10**9)
    assert found
    assert all(what.startswith("dtype=") and " and " in what for what, _ in found)
    assert all(serving.total(one) <= 6 * 10**9 for _, one in found)


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_bytes_are_those_that_generation_allocates(monkeypatch, cache_dtype):
    """Within 5 %: the arrays of a real run's weights and cache."""
    model = ModelConfig(
        vocab_size=512, layers=4, width=128, query_heads=4, key_value_heads=2, head_width=32, feed_forward_width=256
    )
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    loaded = Model(model, params, ExecutionConfig().resolve("cpu"))
    caches = []
    original = generation.cache.of_prompts

    def kept(*arguments, **named):
        caches.append(original(*arguments, **named))
        return caches[-1]

    monkeypatch.setattr(generation.cache, "of_prompts", kept)
    generation.generate(
        generation.ready(loaded), [[1, 2, 3]] * 2, GenerateConfig(max_tokens=8, cache_dtype=cache_dtype)
    )
    places = {leaf.shape[-2] for leaf in jax.tree.leaves(caches[-1]) if leaf.ndim >= 4}
    (context,) = places
    allocated = {
        "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "kv_cache": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches[-1])),
    }
    name = "float32" if cache_dtype == "auto" else "int8"
    planned = serving.needs(Serving(model, context, batch=2, dtype="float32", cache_dtype=name))
    assert planned["weights"] == allocated["weights"]
    scales = jnp.dtype("float32").itemsize / 32  # of an int8 head of 32: an eighth, which the plan leaves out
    assert planned["kv_cache"] * (1 + (scales if name == "int8" else 0)) == pytest.approx(
        allocated["kv_cache"], rel=0.05
    )


def test_plan_of_a_card(capsys):
    arguments = ["plan", "--config=configs/qwen3_30b_a3b_global.py", "--variant=lossless_start", "--json"]
    assert main([*arguments, "--context=32768", "--device=rtx5090"]) == 0
    plans = json.loads(capsys.readouterr().out)
    before, after = plans["lossless_start original"], plans["lossless_start recover_600"]
    assert not before["fits"]
    assert set(before["would_fit_with"]) >= {"dtype=int8"}
    assert after["fits"]
    assert after["serving_bytes"]["weights"] == 2 * 4_360_923_264


def test_an_unknown_card_is_refused(capsys):
    assert main(["plan", "--config=configs/dense_llama_125m.py", "--device=abacus"]) == 2
    assert "known: rtx4090" in capsys.readouterr().err
    with pytest.raises(UserError):
        device("abacus")


@pytest.mark.parametrize(
    ("kind", "gigabytes"),
    [
        ("float32", 28), ("bfloat16", 14), ("int8", 7), ("int4", 3.5), ("ternary", 1.4),
        ("Q4_0", 7 * 18 / 32), ("Q4_K_M", 7 * 4.89 / 8),
    ],
)  # fmt: skip
def test_table_of_seven_billion(monkeypatch, kind, gigabytes):
    monkeypatch.setattr(formats, "parameter_count", lambda _: 7 * 10**9)
    assert formats.formats(QWEN3_8B)["weight_bytes"][kind] / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_table_of_caches():
    found = formats.formats(QWEN3_8B)["cache_bytes"]
    gibibytes = {context: [size / GIB for size in by_bits.values()] for context, by_bits in found.items()}
    assert gibibytes[32_768] == [4.5, 2.25, 1.125]
    assert gibibytes[131_072] == [18, 9, 4.5]
    assert found[1_000_000][16] / 1e9 == pytest.approx(147.5, abs=0.05)
    assert formats.formats(QWEN3_30B)["cache_bytes"][131_072][16] / GIB == 12.0


def test_the_command_prints_the_table(capsys):
    arguments = ["plan", "--config=configs/dense_llama_125m.py", "--table"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split()[0] for line in lines[2:11]]
    assert kinds == ["float32", "bfloat16", "int8", "Q4_K_M", "Q4_0", "mxfp4", "nf4", "int4", "ternary"]
    assert main([*arguments, "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out).values()
    size = table["weight_bytes"]["float32"]
    assert size == 4 * table["parameters"]
    assert lines[2].split() == ["float32", "32", f"{size / 1e9:.2f}", f"{size / GIB:.2f}"]
    assert main([*arguments, "--context=5"]) == 2
    assert "--context does nothing with --table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [("16GB", "B", 16e9), ("16GiB", "B", 16 * GIB), ("448GB/s", "B/s", 448e9), ("0.5 TFLOP/s", "FLOP/s", 5e11)],
)
def test_amounts_with_units(text, unit, amount):
    assert quantity("--memory", text, unit) == amount


@pytest.mark.parametrize("text", ["16", "16Gb", "0GB", "-1GB", "16GB/s", "GB", "1.2.3GB", "nanGB", ""])
def test_amounts_without_a_unit_are_refused(text):
    with pytest.raises(UserError, match=r"--memory=.*such as 16GB"):
        quantity("--memory", text, "B")


def test_plan_of_a_described_card(capsys):
    arguments = ["plan", "--config=configs/dense_llama_125m.py", "--json"]
    card = ["--memory=24GiB", "--bandwidth=1.008TB/s", "--flops=165TFLOP/s"]
    described, named = [], []
    for found, options in ((described, card), (named, ["--device=rtx4090"])):
        assert main([*arguments, *options]) == 0
        found += json.loads(capsys.readouterr().out).values()
    same = ("fits", "device_memory_bytes", "decode_bound_tokens_per_second", "prompt_bound_tokens_per_second")
    assert [described[0][key] for key in same] == [named[0][key] for key in same]


def test_prompts_are_bound_by_the_peak():
    found = serving.prompt_bound(Serving(QWEN3_8B, 1024), device("h100"))
    assert found == pytest.approx(989e12 / forward_flops_per_token(QWEN3_8B, 1024))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory=16GB"], "--memory does nothing without both --memory and --bandwidth"),
        (["--device=h100", "--memory=16GB"], "--memory does nothing with --device"),
        (["--memory=16", "--bandwidth=448GB/s"], "--memory=16 is no amount"),
        (["--flops=1TFLOP/s"], "--flops does nothing without both --memory and --bandwidth"),
    ],
)
def test_half_a_card_is_refused(capsys, options, message):
    assert main(["plan", "--config=configs/dense_llama_125m.py", *options]) == 2
    assert message in capsys.readouterr().err
