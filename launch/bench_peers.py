"""Speed against peer libraries in scoring experts, preparing text and training an adapter: ratios of medians.

- scoring: REAP on a random Qwen3-MoE, against hooks of our own on transformers' model that recompute each
  expert's outputs on its own tokens only. They are not REAP's code, which runs every expert on every token.
- data: text to rows of tokens on disk, against datasets.map with the same tokenizer and number of processes.
- adapter: a training step of LoRA r=8 on queries and values of the dense model of experiment 1, against PEFT.

Command: python launch/bench_peers.py    (writes docs/results/peers/summary.json; --tiny for a quick check)
"""

import dataclasses
import json
import os
import shutil
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from bench_train import peer_config
from side_by_side import Run, compare, options, publish

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "shape", "ours", "peer", "ratio", "aim"]


def our_scores(directory: Path, tokens_BT: np.ndarray) -> tuple[Run, Any]:
    """(`moe-reduce score` on a loaded model, its REAP scores by layer and expert)."""
    import jax

    import moe_reduce
    from moe_reduce.core.config import ExecutionConfig
    from moe_reduce.reduction import scores

    model = moe_reduce.load(directory, execution=ExecutionConfig().resolve(jax.default_backend()))
    batch = {"tokens": tokens_BT, "targets": tokens_BT, "weights": np.ones(tokens_BT.shape, np.float32)}

    def run() -> np.ndarray:
        sums = scores.collect(model, [batch])
        return sums.weighted_norm / np.maximum(sums.counts, 1)

    return run, run()


def their_scores(directory: Path, tokens_BT: np.ndarray) -> tuple[Run, Any]:
    """The same with forward hooks in torch."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: list[np.ndarray] = []

    def hook(module: Any, inputs: Any, _: Any) -> None:
        x_SD = inputs[0].reshape(-1, inputs[0].shape[-1])
        logits = torch.nn.functional.linear(x_SD, module.gate.weight)
        share, chosen = torch.topk(torch.softmax(logits.float(), -1), model.config.num_experts_per_tok)
        share = share / share.sum(-1, keepdim=True)
        experts = module.experts
        rows = []
        for expert in range(model.config.num_experts):
            token, place = torch.where(chosen == expert)
            gate, up = torch.nn.functional.linear(x_SD[token], experts.gate_up_proj[expert]).chunk(2, -1)
            made = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, experts.down_proj[expert])
            weighted = (share[token, place] * made.norm(dim=-1)).sum()
            rows.append(float(weighted / max(len(token), 1)))
        found.append(np.array(rows))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(hook)
    ids = torch.from_numpy(tokens_BT.astype(np.int64))

    def run() -> np.ndarray:
        found.clear()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return np.stack(found)

    return run, run()


def scoring(tiny: bool, repeats: int) -> list[str]:
    """Table row about scoring experts; both sides must agree."""
    import torch
    import transformers

    sizes = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 6, "num_experts": 64}
    rows, length = 8, 512
    if tiny:
        sizes, (rows, length) = sizes | {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 8}, (2, 16)
    config = transformers.Qwen3MoeConfig(
        **sizes, num_experts_per_tok=8 if not tiny else 2, moe_intermediate_size=sizes["hidden_size"] // 2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, norm_topk_prob=True, intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    tokens_BT = np.random.default_rng(0).integers(0, 4096, (rows, length)).astype(np.int32)
    with tempfile.TemporaryDirectory() as place:
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(place)
        sides = {"ours": (our_scores, Path(place), tokens_BT), "peer": (their_scores, Path(place), tokens_BT)}
        seconds, said = compare(sides, repeats)
    np.testing.assert_allclose(said["ours"], said["peer"], rtol=2e-3)
    shape = f"{rows * length:,} tokens, {sizes['num_hidden_layers']} layers of {sizes['num_experts']} experts, fp32"
    what = "REAP scores, beside our own hooks in torch (not REAP's code)"
    return _row(what, shape, rows * length, "tokens/s", seconds)


def _corpus(directory: Path, megabytes: float) -> Path:
    """Writes Python's standard library as JSON lines, and a tokenizer of 8,192 pieces for it."""
    from moe_reduce.core.config import DataConfig
    from moe_reduce.data.sources import documents

    file = directory / "text.jsonl"
    written = 0
    with file.open("w") as out:
        while written < megabytes * 1e6:
            for document in documents(DataConfig(source="python-stdlib")):
                written += out.write(json.dumps({"text": document}) + "\n")
                if written >= megabytes * 1e6:
                    break
    return file


def our_data(file: Path, tokenizer: Path, length: int, workers: int) -> tuple[Run, int]:
    """(preparation into a new cache each time, number of tokens)."""
    from moe_reduce.core.config import DataConfig
    from moe_reduce.data.prepare import prepare

    cache = file.parent / "ours"
    data = DataConfig(
        source=str(file), tokenizer=str(tokenizer), sequence_length=length, validation_fraction=0.0,
        cache=str(cache), workers=workers,
    )  # fmt: skip

    def run() -> int:
        shutil.rmtree(cache, ignore_errors=True)
        tokens: Any = prepare(data, 10**6)[0]
        return tokens.length("train")

    return run, run()


def their_data(file: Path, tokenizer: Path, length: int, workers: int) -> tuple[Run, int]:
    """The same with two maps, as usual: tokenize, then cut into rows."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    cache = file.parent / "theirs"

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        return {"input_ids": [[*ids, 0] for ids in fast(rows["text"], add_special_tokens=False)["input_ids"]]}

    def cut(rows: dict[str, list]) -> dict[str, list]:
        joined = np.concatenate([np.asarray(ids, np.int32) for ids in rows["input_ids"]])
        return {"input_ids": joined[: len(joined) // length * length].reshape(-1, length)}

    def run() -> int:
        shutil.rmtree(cache, ignore_errors=True)
        text = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        settings = {"batched": True, "num_proc": workers}
        ids = text.map(tokenize, remove_columns=text.column_names, **settings)
        return ids.map(cut, **settings).num_rows * length

    return run, run()


def data(tiny: bool, repeats: int) -> list[str]:
    """Table row about preparing text."""
    from moe_reduce.core.config import DataConfig
    from moe_reduce.data.prepare import prepare

    megabytes, length, workers = (0.2, 32, 1) if tiny else (20, 512, 2)
    with tempfile.TemporaryDirectory() as place:
        file = _corpus(Path(place), megabytes)
        small = _corpus(Path(_made(Path(place) / "small")), megabytes / 5)
        trained = DataConfig(source=str(small), sequence_length=length, cache=str(Path(place) / "tokenizer"))
        prepare(trained, 512 if tiny else 8192)
        (tokenizer,) = (Path(place) / "tokenizer").iterdir()
        arguments = (file, tokenizer, length, workers)
        seconds, said = compare({"ours": (our_data, *arguments), "peer": (their_data, *arguments)}, repeats)
    if not 0.9 < said["ours"] / said["peer"] < 1.1:
        raise AssertionError(f"the two sides made different numbers of tokens: {said}")
    shape = f"{megabytes} MB of text, {workers} processes"
    return _row("text to tokens on disk, beside datasets.map", shape, megabytes, "MB/s", seconds)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def our_adapter(config: Any, tokens: np.ndarray) -> tuple[Run, int]:
    """(LoRA training step, number of trained parameters)."""
    import jax
    import jax.numpy as jnp

    from moe_reduce.adapters import adapter as adapters
    from moe_reduce.core import trees
    from moe_reduce.core.config import AdaptConfig, AdapterConfig, ExecutionConfig, TrainConfig
    from moe_reduce.models.decoder import init_params
    from moe_reduce.models.model import Model
    from moe_reduce.runs.adapt import adapt_task
    from moe_reduce.training import optimizer, steps
    from moe_reduce.training.task import partition

    execution = ExecutionConfig(scan_unroll=config.layers).resolve("cpu")
    model = Model(config, jax.jit(partial(init_params, config))(jax.random.key(0)), execution)
    chosen = AdapterConfig(rank=8, targets="q,v")
    task = adapt_task(AdaptConfig(model="random", adapter=chosen, execution=execution), config)
    trained, frozen = partition(adapters.activate(model, adapters.init(chosen, model)).params, task.trainable)
    train = TrainConfig(steps=1000, batch_size=tokens.shape[0], weight_decay=0.0, warmup_steps=0)
    tx = optimizer.build(train, trained, task.records)
    held = [steps.new_state(jax.tree.map(jnp.array, trained), train, tx)]
    step = jax.jit(partial(steps.train_step, task, train, tx), donate_argnums=0)
    ids = jnp.asarray(tokens)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": jnp.ones(ids[:, 1:].shape, jnp.float32)}

    def run() -> float:
        held[0], metrics = step(held[0], frozen, batch)
        return float(metrics["loss"])

    return run, trees.size(trained)


def their_adapter(config: Any, tokens: np.ndarray) -> tuple[Run, int]:
    """The same with PEFT."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    base = transformers.AutoModelForCausalLM.from_config(peer_config(config)).float()
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.0, fused=True)
    ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))

    def run() -> float:
        adam.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        return float(loss)

    return run, sum(parameter.numel() for parameter in trained)


def adapter(tiny: bool, repeats: int) -> list[str]:
    """Table row about a training step of an adapter."""
    from moe_reduce.commands import config_file

    (run,) = config_file.read(str(ROOT / "configs/dense_llama_125m.py"), []).values()
    config, rows, length = run.model, 4, 256
    if tiny:
        config, rows, length = dataclasses.replace(config, layers=2, vocab_size=512), 1, 32
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1)).astype(np.int32)
    sides = {"ours": (our_adapter, config, tokens), "peer": (their_adapter, config, tokens)}
    seconds, said = compare(sides, repeats, config.vocab_size)
    if said["ours"] != said["peer"]:
        raise AssertionError(f"the two sides train different numbers of parameters: {said}")
    shape = f"{rows} × {length} tokens, {said['ours']:,} trained parameters, fp32"
    return _row("LoRA training step, beside PEFT", shape, rows * length, "tokens/s", seconds)


def _row(what: str, shape: str, work: float, unit: str, seconds: dict[str, float]) -> list[str]:
    rates = [f"{work / seconds[side]:,.4g} {unit}" for side in ("ours", "peer")]
    return [what, shape, *rates, f"{seconds['peer'] / seconds['ours']:.2f}×", "> 1×"]


def main() -> None:
    """Measures, prints and writes the result."""
    given = options(__doc__, "peers", repeats=5)
    rows = [section(given.tiny, given.repeats) for section in (scoring, data, adapter)]
    versions = {name: metadata.version(name) for name in ("jax", "torch", "transformers", "peft", "datasets")}
    result = {
        "title": "Beside torch, transformers, PEFT and datasets, CPU",
        "command": "python launch/bench_peers.py",
        "columns": COLUMNS,
        "rows": rows,
        "versions": versions,
    }
    publish(given.out, result)


if __name__ == "__main__":
    main()
