"""A Qwen3-MoE checkpoint of any size, with random bf16 weights in many shards, to measure memory and time.

Usage: python launch/synthetic_moe.py OUT [--layers 6] [--experts 128] [--shard-megabytes 500]    (default: 7.7 GB)
"""

import argparse
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_reduce.core.config import ModelConfig, MoEConfig
from moe_reduce.families import parameter_layouts
from moe_reduce.storage.model_directory import Contents, write_directory

STD = 0.02


def config(layers: int, experts: int, width: int = 2048, hidden: int = 768) -> ModelConfig:
    """The shapes of Qwen3-30B-A3B, with fewer layers and a smaller vocabulary."""
    moe = MoEConfig(experts=experts, active=8, width=hidden)
    return ModelConfig(
        vocab_size=32_000, layers=layers, width=width, query_heads=32, key_value_heads=4, head_width=128, moe=moe,
        tied_embeddings=False, qk_norm=True, rope_theta=1e6, max_positions=32_768,
    )  # fmt: skip


def write(model: ModelConfig, out: Path, shard_bytes: int) -> None:
    """Writes tensor by tensor; each weight is a slice of one random block, at its own offset."""
    generator = np.random.default_rng(0)
    largest = max(math.prod(leaf.stored_shape) for leaf in parameter_layouts(model))
    block = (STD * generator.standard_normal(largest + 4096, np.float32)).astype(ml_dtypes.bfloat16)

    def tensor(shape: tuple[int, ...], norm: bool):
        if norm:
            return lambda: np.ones(shape, ml_dtypes.bfloat16)
        start = int(generator.integers(4096))
        return lambda: block[start : start + math.prod(shape)].reshape(shape)

    items = (
        (
            leaf.name(index),
            leaf.stored_shape,
            np.dtype(ml_dtypes.bfloat16),
            tensor(leaf.stored_shape, "norm" in leaf.path),
        )
        for leaf in parameter_layouts(model)
        for index in np.ndindex(leaf.stacked)
    )
    write_directory(Contents(model, items, "bfloat16", None, None, ()), out, shard_bytes=shard_bytes)


def main() -> None:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--layers", type=int, default=6, help="layers (default: 6)")
    parser.add_argument("--experts", type=int, default=128, help="experts of a layer (default: 128)")
    parser.add_argument("--width", type=int, default=2048, help="width of the model (default: 2048)")
    parser.add_argument("--hidden", type=int, default=768, help="width of an expert (default: 768)")
    parser.add_argument("--shard-megabytes", type=int, default=500, help="size of a file (default: 500)")
    arguments = parser.parse_args()
    model = config(arguments.layers, arguments.experts, arguments.width, arguments.hidden)
    write(model, arguments.out, arguments.shard_megabytes * 1_000_000)


if __name__ == "__main__":
    main()
