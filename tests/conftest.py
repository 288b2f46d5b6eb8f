"""Eight simulated devices and strict arithmetic for all tests, and a tiny corpus that is tokenized once."""

import dataclasses
import gc
import importlib.metadata
import os
import random

# before anything imports jax: the number of devices is read when its backend starts
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
# this and the next: most of the time of these tests goes into compiling
if importlib.metadata.version("jax").startswith("0.10."):  # a flag that is gone ends the process
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["MOE_REDUCE_CACHE"] = "off"  # tests leave nothing in the user's cache directory

import jax
import pytest

from moe_reduce.core.config import ModelConfig, MoEConfig

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


PEERS = ("lm_eval", "peft", "torch")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")
    parser.addoption(
        "--no-peers", action="store_true", help=f"skip the tests that need {', '.join(PEERS)} where they are missing"
    )


def _missing_peer(config, error: str) -> str | None:
    """Reason to skip what failed with this error, where --no-peers allows it."""
    found = [name for name in PEERS if f"No module named '{name}" in error]
    return f"needs {found[0]}, which --no-peers leaves out" if found and config.getoption("--no-peers") else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file that imports a missing peer is skipped as a whole."""
    report = yield
    reason = _missing_peer(collector.config, str(report.longrepr)) if report.failed else None
    if reason:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that imports a missing peer is skipped by itself."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        reason = _missing_peer(pyfuncitem.config, str(error))
        if reason:
            pytest.skip(reason)
        raise


def pytest_collection_modifyitems(config, items):
    # the longest first, so that no core waits for it in the end
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))


def pytest_collection_finish():
    """Exempts the libraries, a million objects, from garbage collection, which took 5 % of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Each compiled function holds memory maps, of which a process may have 65,530: beyond them XLA crashes."""
    yield
    jax.clear_caches()


def text(documents: int, seed: int) -> str:
    """Made-up sentences with some order in them, the same on every machine and for every Python."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(letters[int(draw.random() * 26)] for _ in range(2 + int(draw.random() * 6))) for _ in range(60)]
    follows = [[int(draw.random() * 60) for _ in range(3)] for _ in words]
    found = []
    for _ in range(documents):
        word, sentence = int(draw.random() * 60), []
        for _ in range(40):
            sentence.append(words[word])
            word = follows[word][int(draw.random() * 3)]
        found.append(" ".join(sentence) + ".\n")
    return "".join(found)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A directory of text files, enough for some hundred sequences of 32 tokens."""
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        (directory / f"{number}.txt").write_text(text(documents=40, seed=number % 2))
    return directory


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory):
    """Where all tests keep prepared tokens, so that each corpus is tokenized once."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def tiny_dense() -> ModelConfig:
    """LLaMA shapes: grouped heads, tied full embedding."""
    return ModelConfig(
        vocab_size=64, layers=2, width=16, query_heads=4, key_value_heads=2, head_width=4, feed_forward_width=32
    )


@pytest.fixture
def tiny_neox(tiny_dense) -> ModelConfig:
    """GPT-NeoX shapes: LayerNorm, biases, parallel residual, GELU without a gate, half of each head rotated, untied."""
    changes = {"norm": "layer", "biases": True, "parallel_residual": True, "feed_forward": "gelu", "rotary_share": 0.5}
    return dataclasses.replace(tiny_dense, key_value_heads=4, tied_embeddings=False, norm_epsilon=1e-5, **changes)


@pytest.fixture
def tiny_shared(tiny_dense) -> ModelConfig:
    """One pool and one router for both layers, factorised embedding."""
    moe = MoEConfig(experts=4, active=2, width=24, placement="shared", router="shared")
    return dataclasses.replace(tiny_dense, feed_forward_width=None, moe=moe, embedding_factor=8, init_std=0.3)


@pytest.fixture
def tiny_layer_moe(tiny_dense) -> ModelConfig:
    """Qwen3-MoE shapes: experts and router in each layer, q/k norm, untied."""
    moe = MoEConfig(experts=4, active=2, width=24)
    return dataclasses.replace(tiny_dense, feed_forward_width=None, moe=moe, qk_norm=True, tied_embeddings=False)
