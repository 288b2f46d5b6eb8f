"""Tiny configurations and runs that the training and fault tests share."""

import dataclasses
import json
import os
import re
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_reduce.core import trees
from moe_reduce.core.config import (
    BalanceConfig,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_reduce.models.decoder import init_params
from moe_reduce.training import optimizer, steps
from moe_reduce.training.losses import language_model_task
from moe_reduce.training.steps import State
from moe_reduce.training.throughput import Peak

LENGTH = 32
ONE_DEVICE = MeshConfig(data=1)
SIZES = {"vocab_size": 384, "layers": 2, "width": 16, "query_heads": 4, "key_value_heads": 2, "head_width": 4}
SHARED = MoEConfig(experts=4, active=2, width=16, placement="shared", router="shared")
MODELS = {
    "dense": ModelConfig(**SIZES, feed_forward_width=32),
    "neox": ModelConfig(
        **SIZES | {"key_value_heads": 4}, feed_forward_width=32, tied_embeddings=False, norm="layer", biases=True,
        parallel_residual=True, feed_forward="gelu", rotary_share=0.5,
    ),
    "shared": ModelConfig(**SIZES, moe=SHARED, embedding_factor=8),
    "layer": ModelConfig(**SIZES, moe=MoEConfig(experts=4, active=2, width=16), tied_embeddings=False, qk_norm=True),
    "pool": ModelConfig(
        **SIZES,
        moe=dataclasses.replace(
            SHARED, router="layer", score_function="sigmoid", selection_bias=True, score_offset=True, output_gain=True
        ),
    ),
}  # fmt: skip


def run_config(kind: str, data: DataConfig, mesh: MeshConfig = ONE_DEVICE, **train: Any) -> RunConfig:
    """A run of a few steps on batches of 8; `train` changes its optimisation."""
    defaults = {
        "steps": 20, "batch_size": 8, "learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup_steps": 2,
        "log_every": 1, "evaluate_every": 100, "evaluate_batches": 2, "checkpoint_every": 100,
    }  # fmt: skip
    return RunConfig(
        model=MODELS[kind],
        execution=ExecutionConfig(platform="cpu", block_rows=8),
        data=data,
        mesh=mesh,
        balance=BalanceConfig(),
        train=TrainConfig(**defaults | train),
    )


def corpus_data(corpus: Path, cache: Path, **changes: Any) -> DataConfig:
    """The text corpus of the session, in its token cache."""
    fixed = {"source": str(corpus), "cache": str(cache), "sequence_length": LENGTH, "validation_fraction": 0.1}
    return DataConfig(**fixed | {"workers": 1} | changes)


def token_data(directory: Path, rows: int = 64) -> DataConfig:
    """Rows of ids in a .npy file, each token the one before plus 0, 1 or 2: learnable, and no tokenizer needed."""
    generator = np.random.default_rng(0)
    steps = generator.integers(0, 3, (rows, LENGTH)).cumsum(axis=1)
    tokens = (generator.integers(0, 300, (rows, 1)) + steps).astype(np.int32)
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "tokens.npy", tokens)
    return DataConfig(source=str(directory / "tokens.npy"), sequence_length=LENGTH, validation_fraction=0.25)


def unmeasured_peak(*_: Any) -> Peak:
    """In place of a measurement that takes seconds."""
    return Peak(1e11, "not measured")


def metrics(workdir: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of one split of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def losses(workdir: Path) -> np.ndarray:
    """The training loss of each logged step."""
    return np.array([line["loss"] for line in metrics(workdir)])


def assert_close(found: trees.Tree, expected: trees.Tree, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same leaves, each within the tolerance of the expected one; equal by default."""
    leaves, wanted = trees.flatten(found), trees.flatten(expected)
    assert set(leaves) == set(wanted)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=rtol, atol=atol, err_msg=path)


@lru_cache
def initial_params(model: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """As a run starts, made once for all tests."""
    return jax.jit(lambda: init_params(model, jax.random.key(seed)))()


def step_function(run: RunConfig) -> tuple[Any, State]:
    """The compiled training step of a run, on one device, and its first state."""
    task = language_model_task(run.model, run.execution.resolve("cpu"), run.balance)
    params = initial_params(run.model, run.train.seed)
    tx = optimizer.build(run.train, params, task.records)
    return jax.jit(partial(steps.train_step, task, run.train, tx)), steps.new_state(params, run.train, tx)


def random_batch(seed: int = 0, rows: int = 8, masked: bool = False) -> dict[str, jax.Array]:
    """Random tokens; if masked, two documents a row and rows of which more and more targets do not count."""
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, LENGTH + 1), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, LENGTH), np.float32)}
    if masked:
        places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH))
        starts = 4 + 2 * np.arange(rows, dtype=np.int32)[:, None]
        batch["segments"] = 1 + (places >= starts).astype(np.int32)
        batch["positions"] = np.where(places >= starts, places - starts, places)
        batch["weights"] = (places >= starts).astype(np.float32)
    return {name: jnp.asarray(value) for name, value in batch.items()}


CONFIG_FILE = """
from moe_reduce.core import config as defaults


def get_config():
    config = defaults.base()
    config.model.update(
        vocab_size=384, layers=2, width=16, query_heads=4, key_value_heads=2, head_width=4, embedding_factor=8
    )
    config.model.moe = defaults.moe_base()
    config.model.moe.update(experts=4, active=2, width=16, placement="shared", router="shared")
    config.execution.block_rows = 8
    config.mesh.data = 1
    config.data.update(source={source!r}, cache={cache!r}, sequence_length=32, workers=1)
    config.data.validation_fraction = {fraction}
    config.train.update(
        steps=20, batch_size=8, learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2,
        log_every=1, evaluate_every=100, evaluate_batches=2, checkpoint_every=100,
    )
    config.update({changes!r})
    return config
"""


def write_config(directory: Path, data: DataConfig, **changes: Any) -> Path:
    """A configuration file of the shared mixture, as a user would write it; `changes` are groups of keys."""
    file = directory / "config.py"
    values = {"source": data.source, "cache": data.cache, "fraction": data.validation_fraction}
    file.write_text(CONFIG_FILE.format(**values, changes=changes))
    return file


def environment(devices: int, cache: Path | None) -> dict[str, str]:
    """Of a process of the command line, which keeps what it compiles in `cache`, if any, for the next."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | {"XLA_FLAGS": flags} | (kept if cache else {})


def command(*arguments: object) -> list[str]:
    """`moe-reduce train` with these arguments."""
    return [sys.executable, "-m", "moe_reduce", "train", *map(str, arguments)]
