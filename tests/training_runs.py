"""Tiny configurations and runs that the training and fault tests share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_reduce.config import (
    BalanceConfig,
    DataConfig,
    ExecutionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from moe_reduce.training.throughput import Peak

LENGTH = 32
ONE_DEVICE = MeshConfig(data=1)
SIZES = {"vocab_size": 384, "layers": 2, "width": 16, "query_heads": 4, "key_value_heads": 2, "head_width": 4}
SHARED = MoEConfig(experts=4, active=2, width=16, placement="shared", router="shared")
MODELS = {
    "dense": ModelConfig(**SIZES, feed_forward_width=32),
    "shared": ModelConfig(**SIZES, moe=SHARED, embedding_factor=8),
    "layer": ModelConfig(**SIZES, moe=MoEConfig(experts=4, active=2, width=16), tied_embeddings=False, qk_norm=True),
    "pool": ModelConfig(
        **SIZES,
        moe=dataclasses.replace(
            SHARED, router="layer", score_function="sigmoid", selection_bias=True, output_gain=True
        ),
    ),
}


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
