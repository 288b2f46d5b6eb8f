"""What it costs to write an adapter from a description, beside training and beside prompts with examples.

For each head: seconds to write 1 and 8 adapters, beside one training step of a single adapter (8 rows of 128 tokens);
floating-point operations of an adapter and of 1, 10 and 100 questions without a prompt, beside the same questions with
three examples in front of each; bytes of the hypernetwork, beside those of the adapters of a library. Values of the
network's weights do not change these figures, so it is not trained.

Command: python launch/bench_hypernetwork.py --model=runs/smollm2 [--out=FILE.json]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moe_reduce
from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters.hypernetwork import hypernetwork as hypernetworks
from moe_reduce.core import disk
from moe_reduce.core.config import AdapterConfig, MeshConfig, TextToLoraConfig, TrainConfig
from moe_reduce.core.hypernetwork_config import HypernetworkConfig
from moe_reduce.models.deltas import ADAPTER
from moe_reduce.models.model import Model
from moe_reduce.planning.flops import forward_flops_per_token
from moe_reduce.runs.text_to_lora import objectives
from moe_reduce.training import sharding, steps
from moe_reduce.training.task import partition

ROWS, LENGTH, WIDTH = 8, 128, 384
QUESTION, ANSWER, EXAMPLES = 64, 8, 3 * 72  # tokens
ADAPTER_CONFIGS = {
    "core": AdapterConfig(method="skema", targets="q,v", sketch_width=85),
} | dict.fromkeys("LMS", HypernetworkConfig().adapter)


def main() -> None:
    """Prints one line for each head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--library", type=int, default=479, help="adapters of the library (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    base = moe_reduce.load(given.model)
    step = seconds(training_step(base), given.repeats)
    found = {head: measured(head, base, step, given) for head in ("L", "M", "S", "core")}
    if given.out:
        disk.write_json(given.out, {"training step, seconds": step, "heads": found})


def measured(head: str, base: Model, step: float, given: argparse.Namespace) -> dict[str, Any]:
    """Figures of one head."""
    config = HypernetworkConfig(head=head, adapter=ADAPTER_CONFIGS[head])
    hypernetwork = hypernetworks.init(config, base, WIDTH)
    embeddings = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)
    times = {count: seconds(lambda n=count: write(hypernetwork, embeddings[:n]), given.repeats) for count in (1, 8)}
    flops = write_flops(hypernetwork)
    per_token = forward_flops_per_token(base.config, QUESTION + ANSWER)
    questions = {n: flops + n * (QUESTION + ANSWER) * per_token for n in (1, 10, 100)}
    prompted = {n: n * (EXAMPLES + QUESTION + ANSWER) * per_token for n in (1, 10, 100)}
    adapter = adapters.count(adapters.init(config.adapter, base))
    figures = {
        "parameters": hypernetworks.count(hypernetwork),
        "adapter parameters": adapter,
        "seconds for 1 adapter": times[1],
        "seconds for 8 adapters": times[8],
        "share of a training step": times[1] / step,
        "FLOPs of an adapter": flops,
        "FLOPs, share of 3 examples": {n: questions[n] / prompted[n] for n in questions},
        "bytes, share of the library": hypernetworks.count(hypernetwork) / (given.library * adapter),
    }
    shares = ", ".join(f"{n}: {share:.2f}" for n, share in figures["FLOPs, share of 3 examples"].items())
    print(
        f"{head}: {figures['parameters']:,} parameters; one adapter of {adapter:,} in {times[1]:.3f} s "
        f"({figures['share of a training step']:.3f} of a training step), eight in {times[8]:.3f} s; FLOPs of so many "
        f"questions beside 3 examples: {shares}; bytes beside {given.library} adapters: "
        f"{figures['bytes, share of the library']:.3f}",
        flush=True,
    )
    return figures


def write(hypernetwork: hypernetworks.Hypernetwork, embeddings: np.ndarray) -> None:
    """Writes adapters and waits for them."""
    jax.block_until_ready([adapter.tree for adapter in hypernetworks.written(hypernetwork, embeddings)])


def write_flops(hypernetwork: hypernetworks.Hypernetwork) -> float:
    """FLOPs of writing one adapter, as the compiler counts them."""
    program = jax.jit(lambda params, x: hypernetworks.emit(hypernetwork.with_params(params), x))
    cost: Any = program.lower(hypernetwork.params, jnp.zeros((1, WIDTH))).compile().cost_analysis()
    return float(cost["flops"])


def training_step(base: Model) -> Callable[[], None]:
    """One step of training a single LoRA, ready to be timed."""
    new = adapters.init(HypernetworkConfig().adapter, base)
    task = objectives.multitask(base, new, TextToLoraConfig(model="base"))
    train = TrainConfig(steps=10, batch_size=ROWS, learning_rate=1e-4)
    trained, frozen = partition(base.params | {ADAPTER: new.tree}, task.trainable)
    program = steps.program(task, train, sharding.make_mesh(MeshConfig(data=1)), trained)
    state = jax.jit(program.new_state, out_shardings=program.shardings)(jax.tree.map(jnp.copy, trained))
    ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((ROWS, LENGTH), np.float32)}
    batch |= {"task": np.zeros(ROWS, np.int32), "embedding": np.zeros((ROWS, 1), np.float32)}

    def run() -> None:
        nonlocal state
        state, metrics = program.step(state, frozen, batch)
        jax.block_until_ready(metrics)

    return run


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call; the first call, which compiles, does not count."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
