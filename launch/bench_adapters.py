"""Adapters against full fine-tuning: step time, memory, state; and SkeMA's fast projection against a dense one.

All steps alternate in one process (full, LoRA, SkeMA, full, …), with random weights: on the dense model of experiment
1, LoRA of rank 8 on queries and values and SkeMA with equally many parameters; on the MoE of experiment 2, LoRA of rank
2 on every expert. Peak memory is XLA's estimate for the compiled step: arguments and temporaries. The projection S·x is
timed as an SRHT and as its dense matrix.

Command: python launch/bench_adapters.py    (writes docs/results/adapters_cost/summary.json; --tiny for a quick check)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import check_learning, medians, options, publish

from moe_reduce.adapters import adapter as adapters
from moe_reduce.adapters import merging, projections
from moe_reduce.adapters.budget import within_budget
from moe_reduce.commands import config_file
from moe_reduce.core import trees
from moe_reduce.core.config import AdaptConfig, AdapterConfig, ExecutionConfig, ModelConfig, TrainConfig
from moe_reduce.models import deltas
from moe_reduce.models.decoder import init_params
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import parameter_count
from moe_reduce.runs.adapt import adapt_task
from moe_reduce.training import optimizer, steps
from moe_reduce.training.task import partition

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "measured", "aim"]


class Step:
    """A compiled training step of one adaptation method, and its state."""

    def __init__(self, model: Model, chosen: AdapterConfig | None, batch: dict[str, jax.Array]):
        run = AdaptConfig(model="random", adapter=chosen, execution=model.execution)
        train = TrainConfig(steps=1000, batch_size=batch["tokens"].shape[0], warmup_steps=0)
        start = model if chosen is None else adapters.activate(model, adapters.init(chosen, model))
        task = adapt_task(run, model.config)
        trained, self.frozen = partition(start.params, task.trainable)
        tx = optimizer.build(train, trained, task.records)
        self.state = steps.new_state(jax.tree.map(jnp.array, trained), train, tx)
        self.batch = batch
        step = jax.jit(partial(steps.train_step, task, train, tx), donate_argnums=0)
        self.compiled = step.lower(self.state, self.frozen, batch).compile()
        memory = self.compiled.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.trained = trees.size(trained)
        self.losses: list[float] = []

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        self.losses.append(float(metrics["loss"]))


def compared(model: Model, lora: AdapterConfig, batch: dict[str, jax.Array], repeats: int):
    """(steps of full fine-tuning, LoRA and a SkeMA with equally many parameters, their seconds, the SkeMA)."""
    allowed = adapters.count(adapters.init(lora, model))
    skema = within_budget(AdapterConfig(method="skema", targets=lora.targets), model.config, allowed)
    made = {"full": Step(model, None, batch), "lora": Step(model, lora, batch), "skema": Step(model, skema, batch)}
    seconds = medians(dict(made), repeats)
    for name, one in made.items():
        check_learning(name, one.losses, model.config.vocab_size)
    return made, seconds, skema


def random_model(config: ModelConfig) -> Model:
    """A model with random weights."""
    execution = ExecutionConfig(scan_unroll=config.layers).resolve("cpu")
    return Model(config, jax.jit(partial(init_params, config))(jax.random.key(0)), execution)


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """A batch of random tokens."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.ones((rows, length)),
    }


def of_experts(config: ModelConfig, rows: int, length: int, repeats: int) -> list[list[str]]:
    """Rows of the table about adapting every expert of an MoE."""
    assert config.moe is not None
    lora = AdapterConfig(targets="mlp", rank=2)
    _, seconds, _ = compared(random_model(config), lora, random_batch(config, rows, length), repeats)
    where = f"{config.moe.experts} experts of {parameter_count(config):,} parameters"
    return [
        [f"step of {name} on {where} / of full fine-tuning", f"{seconds[name] / seconds['full']:.2f}×", ""]
        for name in ("lora", "skema")
    ]


def adaptation(config: ModelConfig, rows: int, length: int, repeats: int) -> list[list[str]]:
    """Rows of the table about training and merged inference."""
    model, batch = random_model(config), random_batch(config, rows, length)
    made, seconds, skema = compared(model, AdapterConfig(rank=8), batch, repeats)
    adapter = adapters.init(dataclasses.replace(skema, core_std=0.1), model)
    merged = merging.merge(model, adapter)
    models = {"base": model, "merged": merged}
    inference = medians({name: partial(_wait, one, batch["tokens"]) for name, one in models.items()}, repeats)
    full = made["full"]
    found = []
    for name in ("lora", "skema"):
        one = made[name]
        label = f"{name} ({one.trained:,} parameters)"
        found += [
            [f"step of {label} / step of full fine-tuning", f"{seconds[name] / seconds['full']:.2f}×", "≤ 0.7×"],
            [f"optimiser state of {label} / of full", f"{one.trained / full.trained:.2%}", "≤ 1 %"],
            [f"peak memory of {label} / of full", f"{one.bytes / full.bytes:.2f}×", ""],
        ]
    found.append(["step of skema / step of lora", f"{seconds['skema'] / seconds['lora']:.2f}×", "≤ 1.1×"])
    found.append(["merged inference / base inference", f"{inference['merged'] / inference['base']:.2f}×", "1×"])
    for dtype in ("float32", "bfloat16"):
        stored = dataclasses.replace(model, params=jax.tree.map(lambda leaf, to=dtype: leaf.astype(to), model.params))
        active = adapters.activate(stored, adapter)(batch["tokens"])
        difference = jnp.max(jnp.abs(merging.merge(stored, adapter)(batch["tokens"]) - active))
        share = float(difference / jnp.max(jnp.abs(active)))
        found.append([f"merged - active, of the largest logit, base in {dtype}", f"{share:.1e}", ""])
    return found


def projection(sizes: list[int], width: int, repeats: int) -> list[list[str]]:
    """Rows about S·x of 256 vectors: SRHT beside its dense matrix, and how its time grows with d."""
    seconds = {}
    for size in sizes:
        made = projections.make("srht", width, size, 0, "bench")
        signs, rows = jnp.asarray(made["signs"]), jnp.asarray(made["rows"])
        dense = jnp.asarray(projections.dense(made, size), jnp.float32) if size <= 4096 else None
        x = jax.random.normal(jax.random.key(0), (256, size))
        fast = jax.jit(deltas.srht)
        runs: dict[str, Callable[[], Any]] = {"srht": partial(_wait, fast, x, signs, rows)}
        if dense is not None:
            product = jax.jit(lambda x, matrix: x @ matrix.T)
            runs["dense"] = partial(_wait, product, x, dense)
        seconds[size] = medians(runs, repeats)
    found = [
        [f"SRHT / its dense product, d = {size}, k = {width}", f"{one['srht'] / one['dense']:.2f}×", "< 1×"]
        for size, one in seconds.items()
        if "dense" in one
    ]
    first, last = sizes[0], sizes[-1]
    growth = seconds[last]["srht"] / seconds[first]["srht"]
    expected = last * np.log2(last) / (first * np.log2(first))
    found.append([f"SRHT's time, d = {first} → {last}", f"{growth:.1f}×", f"d·log d: {expected:.1f}×"])
    return found


def read_model(name: str) -> ModelConfig:
    """The architecture in a pretraining configuration."""
    (run,) = config_file.read(str(ROOT / f"configs/{name}.py"), []).values()
    return run.model


def _wait(function: Callable[..., Any], *arguments: Any) -> None:
    jax.block_until_ready(function(*arguments))


def main() -> None:
    """Measures, prints and writes the result."""
    given = options(__doc__, "adapters_cost", repeats=5)
    config, mixture = (read_model(name) for name in ("dense_llama_125m", "small_qwen3_moe"))
    if given.tiny:
        config, mixture = (
            dataclasses.replace(
                one, vocab_size=256, layers=2, width=64, query_heads=2, key_value_heads=2, head_width=32
            )
            for one in (config, mixture)
        )
        config = dataclasses.replace(config, feed_forward_width=128)
        rows = adaptation(config, 2, 32, 2) + of_experts(mixture, 2, 32, 2) + projection([64, 256], 32, 2)
    else:
        rows = adaptation(config, 4, 256, given.repeats) + of_experts(mixture, 16, 256, 3 * given.repeats)
        rows += projection([1024, 4096, 16384], 1024, 15)
    total = parameter_count(config)
    result = {
        "title": f"What adapting costs, on {total:,} parameters, fp32, CPU",
        "command": "python launch/bench_adapters.py",
        "columns": COLUMNS,
        "rows": rows,
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    publish(given.out, result)


if __name__ == "__main__":
    main()
