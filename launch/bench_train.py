"""Training speed on this machine, compared with transformers on torch; ratios of medians.

Shapes, precision, threads, AdamW with clipping and malloc settings are the same. Each side has its own process, so that
neither inherits the other's heap, and steps alternate (ours, theirs, ours, …), so that drift of the machine's speed
affects both alike. bfloat16 means fp32 master weights and bf16 matmuls on both sides (compute_dtype, torch.autocast).
Also compares the MoE layer, forward and backward, with the matmul peak measured between its runs.

Command: ./launch/bench_train.sh    (writes docs/results/cpu_speed/summary.json; --tiny for a quick check)
"""

import dataclasses
import os
import platform
import time
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import Run, compare, medians, options, publish

from moe_reduce.commands import config_file
from moe_reduce.core.config import ExecutionConfig, ModelConfig, RunConfig
from moe_reduce.models.decoder import init_params
from moe_reduce.models.moe import dispatch
from moe_reduce.models.moe.experts import Experts, cast_experts
from moe_reduce.models.parameters import parameter_count
from moe_reduce.models.weights import Weight
from moe_reduce.planning.flops import train_flops_per_token
from moe_reduce.training import optimizer, steps
from moe_reduce.training.losses import language_model_task

ROOT = Path(__file__).parent.parent


def our_step(run: RunConfig, tokens: np.ndarray) -> tuple[Run, float]:
    """(one training step as the loop runs it, seconds of its compilation)."""
    task = language_model_task(run.model, run.execution, run.balance)
    params = jax.jit(partial(init_params, run.model))(jax.random.key(0))
    tx = optimizer.build(run.train, params, task.records)
    state = steps.new_state(params, run.train, tx)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.ones(tokens[:, 1:].shape, jnp.float32),
    }
    started = time.perf_counter()
    step = jax.jit(partial(steps.train_step, task, run.train, tx), donate_argnums=0).lower(state, {}, batch).compile()
    compile_seconds = time.perf_counter() - started
    holder = [state]

    def go() -> float:
        holder[0], metrics = step(holder[0], {}, batch)
        return float(metrics["loss"])

    return go, compile_seconds


def their_step(run: RunConfig, tokens: np.ndarray) -> tuple[Run, float]:
    """The same step in torch."""
    import torch
    import transformers

    train = run.train
    model = transformers.AutoModelForCausalLM.from_config(peer_config(run.model)).float().train()
    half = run.execution.compute_dtype == "bfloat16"
    adam = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.epsilon,
        weight_decay=train.weight_decay, fused=True,
    )  # fmt: skip
    ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))

    def go() -> float:
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        adam.step()
        return float(loss)

    return go, 0.0


def peer_config(model: ModelConfig) -> Any:
    """Configuration of the transformers model with the same attention and feed-forward shapes."""
    import transformers

    shared = {
        "vocab_size": model.vocab_size, "hidden_size": model.width, "num_hidden_layers": model.layers,
        "num_attention_heads": model.query_heads, "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width, "tie_word_embeddings": True,
    }  # fmt: skip
    if model.moe is None:
        return transformers.LlamaConfig(intermediate_size=model.feed_forward_width, **shared)
    return transformers.Qwen3MoeConfig(
        num_experts=model.moe.experts, num_experts_per_tok=model.moe.active, moe_intermediate_size=model.moe.width,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01, **shared,
    )  # fmt: skip


def same(model: ModelConfig) -> ModelConfig:
    """The model of the configuration."""
    return model


def with_own_experts(model: ModelConfig) -> ModelConfig:
    """The architecture of the shared MoE's peer, Qwen3-MoE: experts and a router in each layer, a whole embedding."""
    assert model.moe is not None
    moe = dataclasses.replace(model.moe, placement="layer", router="layer")
    return dataclasses.replace(model, moe=moe, embedding_factor=None, qk_norm=True)


def compare_steps(name: str, run: RunConfig, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Compares our training step with transformers'."""
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (batch, length + 1)).astype(np.int32)
    sides = {"ours": (our_step, run, tokens), "peer": (their_step, run, tokens)}
    result, said = compare(sides, repeats, run.model.vocab_size)
    flops = train_flops_per_token(run.model, length) * batch * length
    precision = {"float32": "fp32", "bfloat16": "bf16 with fp32 masters"}[run.execution.compute_dtype]
    return {
        "name": name,
        "shape": f"{batch} × {length} tokens, {precision}, AdamW",
        "our_parameters": parameter_count(run.model),
        "our_tokens_per_second": batch * length / result["ours"],
        "peer_tokens_per_second": batch * length / result["peer"],
        "ratio": result["peer"] / result["ours"],
        "our_flops_per_second": flops / result["ours"],
        "compile_seconds": said["ours"],
    }


def moe_layer(model: ModelConfig, rows: int, repeats: int) -> dict[str, Any]:
    """Useful FLOP/s of the dropless MoE layer as a share of the faster of two matmuls, run in turn."""
    assert model.moe is not None
    experts, active, hidden = model.moe.experts, model.moe.active, model.moe.width
    keys = jax.random.split(jax.random.key(0), 6)
    x_SD = jax.random.normal(keys[0], (rows, model.width))
    pool = (
        jax.random.normal(keys[1], (experts, model.width, hidden)) * 0.02,
        jax.random.normal(keys[2], (experts, model.width, hidden)) * 0.02,
        jax.random.normal(keys[3], (experts, hidden, model.width)) * 0.02,
    )
    weights_SA, chosen_SA = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[4], (rows, experts))), active)
    execution = ExecutionConfig().resolve("cpu")

    def layer(x_SD, weights_SA, matrices):
        experts, masters = cast_experts(Experts(*map(Weight, matrices)), x_SD.dtype, trained=True)
        rows = dispatch.Assigned(x_SD, chosen_SA, weights_SA)
        return dispatch.DISPATCHES[execution.dispatch](rows, experts, masters, execution).y_SD

    def gradient(x_SD, weights_SA, matrices):
        return jax.vjp(layer, x_SD, weights_SA, matrices)[1](x_SD)

    forward, both, multiply = jax.jit(layer), jax.jit(gradient), jax.jit(jnp.matmul)
    square = jax.random.normal(keys[5], (2048, 2048))
    tall = jax.random.normal(keys[5], (rows * active, model.width))
    result = medians(
        {
            "square": lambda: jax.block_until_ready(multiply(square, square)),
            "tall": lambda: jax.block_until_ready(multiply(tall, pool[0][0])),
            "forward": lambda: jax.block_until_ready(forward(x_SD, weights_SA, pool)),
            "forward_backward": lambda: jax.block_until_ready(both(x_SD, weights_SA, pool)),
        },
        repeats,
    )
    flops = 6 * rows * active * model.width * hidden
    peak = max(2 * 2048**3 / result["square"], flops / 3 / result["tall"])
    return {
        "name": "MoE layer, dropless",
        "shape": f"{rows} tokens, E={experts}, top-{active}, D={model.width}, F={hidden}, fp32",
        "matmul_peak": peak,
        "forward_share_of_peak": flops / result["forward"] / peak,
        "forward_backward_share_of_peak": 3 * flops / result["forward_backward"] / peak,
    }


def table(rows: list[dict[str, Any]], layer: dict[str, Any]) -> list[list[str]]:
    """The cells of the results table."""
    cells = [
        [
            row["name"], row["shape"], f"{row['our_tokens_per_second']:.0f} tokens/s",
            f"{row['peer_tokens_per_second']:.0f} tokens/s", f"{row['ratio']:.2f}×", aim,
        ]
        for row, aim in zip(rows, ("≥ 1.4×", "≥ 1.4×", "≥ 1.7×", "≥ 1.7×", "", ""), strict=True)
    ]  # fmt: skip
    for part in ("forward", "forward_backward"):
        share = layer[f"{part}_share_of_peak"]
        ours, peak = share * layer["matmul_peak"] / 1e9, layer["matmul_peak"] / 1e9
        name = f"{layer['name']}, {part.replace('_', ' and ')}, of the matmul peak"
        cells.append([name, layer["shape"], f"{ours:.0f} GFLOP/s", f"{peak:.0f} GFLOP/s", f"{share:.0%}", "≥ 50 %"])
    return cells


def main() -> None:
    """Measures and writes the summary."""
    given = options(__doc__, "cpu_speed", repeats=5)
    small = ["--config.model.layers=2", "--config.model.vocab_size=512"] if given.tiny else []
    batch, length = (1, 32) if given.tiny else (4, 256)

    def read(name: str, dtype: str) -> RunConfig:
        execution = ["--config.execution.platform=cpu", f"--config.execution.compute_dtype={dtype}"]
        overrides = [*execution, "--config.execution.remat=none", "--config.execution.scan_unroll=12", *small]
        (run,) = config_file.read(str(ROOT / "configs" / name), overrides).values()
        train = dataclasses.replace(run.train, warmup_steps=0)  # as the peer; it shows that the step learns
        return dataclasses.replace(run, train=train, execution=run.execution.resolve("cpu"))

    pairs = (
        ("dense_llama_125m.py", same, "dense LLaMA 137.8M vs transformers LlamaForCausalLM"),
        ("shared_moe_50m.py", same, "shared MoE 49.6M (one pool) vs transformers Qwen3MoeForCausalLM 362.1M (12 pools, "
         "whole embedding)"),
        ("shared_moe_50m.py", with_own_experts, "per-layer MoE 362.1M vs transformers Qwen3MoeForCausalLM, the same "
         "architecture"),
    )  # fmt: skip
    rows = []
    for file, change, name in pairs:
        for dtype in ("float32", "bfloat16"):
            print(name, dtype, flush=True)
            run = read(file, dtype)
            run = dataclasses.replace(run, model=change(run.model))
            rows.append(compare_steps(name, run, batch, length, given.repeats))
    shared = read("shared_moe_50m.py", "float32")
    layer = moe_layer(shared.model, 64 if given.tiny else 2048, 2 * given.repeats)
    versions = {name: metadata.version(name) for name in ("jax", "torch", "transformers")}
    summary = {
        "title": f"Training speed on CPU beside transformers {versions['transformers']} on torch {versions['torch']}",
        "command": "./launch/bench_train.sh",
        "columns": ["what", "shape", "ours", "peer", "ratio", "aim"],
        "rows": table(rows, layer),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions,
        "steps": rows,
        "layer": layer,
    }
    publish(given.out, summary)


if __name__ == "__main__":
    main()
