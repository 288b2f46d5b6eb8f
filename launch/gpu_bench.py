"""What one accelerator makes of the models: MFU of training, the expert layer, attention, decoding, bf16 beside fp32.

Everything is stated against a bf16 matmul measured in the same run. Training steps are those of the configurations, at
METHODS' batch for each of 32 devices (16 sequences of 1,024 tokens), with the loop's own program. A step that does not
fit is a row that says so; anything else that fails is an error, and that no step fits. Needs the packages of the
plain install and nothing else.

Command: ./launch/gpu_bench.sh    (writes docs/results/gpu/summary.json; --tiny checks the script on a CPU)
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import check_learning, options, publish

from moe_reduce import planning
from moe_reduce.commands import config_file
from moe_reduce.config import GenerateConfig, MeshConfig, ModelConfig, MoEConfig, RunConfig
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models import dispatch
from moe_reduce.models.decoder import Decoder, init_params
from moe_reduce.models.layers import causal_attention
from moe_reduce.models.routing import route, router_logits
from moe_reduce.storage.model import Model
from moe_reduce.training import sharding, steps
from moe_reduce.training.run import pretraining

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "shape", "measured", "of the matmul peak", "aim"]
CONFIGS = {"dense 137.8M": "dense_llama_125m.py", "shared MoE 49.6M": "shared_moe_50m.py"}
ACTIVE, HIDDEN = 8, 768  # of Qwen3-30B-A3B, for routing
AIMS = {"dense 137.8M": "≥ 50 %", "shared MoE 49.6M": "≥ 35 %"}


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds, after two rounds that compile and warm up."""
    measured = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        jax.block_until_ready(run())
        measured.append(time.perf_counter() - started)
    return float(np.median(measured[2:]))


def matmul_peak(size: int, repeats: int) -> float:
    """bf16 FLOP/s of a square product with an fp32 sum, ten in a row."""
    matrix = jnp.ones((size, size), jnp.bfloat16)

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(10):
            x = jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
        return x

    return 20 * size**3 / seconds_of(partial(chain, matrix), repeats)


def read(file: str, tiny: bool, **execution: Any) -> RunConfig:
    """A configuration for this platform."""
    small = ["--config.model.layers=2", "--config.model.vocab_size=512"] if tiny else []
    (run,) = config_file.read(str(ROOT / "configs" / file), small).values()
    wanted = dataclasses.replace(run.execution, platform="auto", **execution)
    return dataclasses.replace(run, execution=wanted.resolve(jax.default_backend()))


def training(run: RunConfig, rows: int, length: int, repeats: int) -> dict[str, float]:
    """Tokens a second and FLOP/s of a training step."""
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=rows, warmup_steps=0))
    job = pretraining(run)
    mesh = sharding.make_mesh(MeshConfig(data=1))
    program = steps.program(job.task, job.train, mesh, jax.eval_shape(job.initial))
    held = [jax.jit(lambda: program.new_state(job.initial()), out_shardings=program.places)()]
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (rows, length + 1), dtype=np.int32)
    weights = np.ones((rows, length), np.float32)
    batch = sharding.put_batch(mesh, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})

    losses = []

    def once() -> Any:
        with jax.set_mesh(mesh):
            held[0], metrics = program.step(held[0], {}, batch)
        losses.append(metrics["loss"])
        return metrics["loss"]

    seconds = seconds_of(once, repeats)
    check_learning("the training step", [float(loss) for loss in losses], run.model.vocab_size)
    flops = planning.train_flops_per_token(run.model, length) * rows * length
    return {"tokens_per_second": rows * length / seconds, "flops": flops / seconds}


def expert_layer(model: ModelConfig, name: str, tokens: int, repeats: int) -> dict[str, float]:
    """Useful FLOP/s of the expert layer in bf16 under one dispatch, forward and with gradients."""
    assert model.moe is not None
    experts, hidden, active = model.moe.experts, model.moe.width, model.moe.active
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((experts, model.width, hidden), (experts, model.width, hidden), (experts, hidden, model.width))
    drawn = (jax.random.normal(key, size) * 0.02 for key, size in zip(keys[:3], sizes, strict=True))
    matrices = dispatch.Experts(*drawn)
    x_SD = jax.random.normal(keys[3], (tokens, model.width), jnp.bfloat16)
    weights_SA, chosen_SA = jax.lax.top_k(jax.random.uniform(keys[4], (tokens, experts)), active)
    execution = read(CONFIGS["shared MoE 49.6M"], tiny=False, dispatch=name, compute_dtype="bfloat16").execution

    def layer(x_SD: jax.Array, matrices: dispatch.Experts) -> jax.Array:
        pool = dispatch.Pool.of(matrices, jnp.dtype("bfloat16"))
        return dispatch.DISPATCHES[name](x_SD, chosen_SA, weights_SA, pool, execution).y_SD

    def both(x_SD: jax.Array, matrices: dispatch.Experts) -> Any:
        return jax.vjp(layer, x_SD, matrices)[1](x_SD)

    flops = 6 * tokens * active * model.width * hidden
    forward = seconds_of(partial(jax.jit(layer), x_SD, matrices), repeats)
    backward = seconds_of(partial(jax.jit(both), x_SD, matrices), repeats)
    return {"forward": flops / forward, "forward and backward": 3 * flops / backward}


def attention(run: RunConfig, way: str, rows: int, length: int, repeats: int) -> dict[str, float]:
    """FLOP/s of one layer's attention in bf16, of the half of the products that is causal."""
    model = run.model
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (model.query_heads, model.key_value_heads, model.key_value_heads)
    q, k, v = (
        jax.random.normal(key, (rows, length, count, model.head_width), jnp.bfloat16)
        for key, count in zip(keys, heads, strict=True)
    )

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if way == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return causal_attention(q, k, v, None, run.execution.products)

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.vjp(mix, q, k, v)[1](q)

    flops = 2 * rows * length**2 * model.query_heads * model.head_width
    forward = seconds_of(partial(jax.jit(mix), q, k, v), repeats)
    backward = seconds_of(partial(jax.jit(both), q, k, v), repeats)
    return {"forward": flops / forward, "forward and backward": 3 * flops / backward}


def routing(tokens: int, experts: int, width: int, repeats: int) -> float:
    """Seconds of the router's product, top-8, sorting, and moving rows there and back."""
    x_SD = jax.random.normal(jax.random.key(0), (tokens, width), jnp.bfloat16)
    router_DE = jax.random.normal(jax.random.key(1), (width, experts)) * 0.1
    moe = MoEConfig(experts=experts, active=ACTIVE, width=HIDDEN)

    def run(x_SD: jax.Array, router_DE: jax.Array) -> jax.Array:
        chosen = route(router_logits(x_SD, router_DE, None), None, moe)
        order = dispatch.sort_by_expert(chosen.experts_SA, experts)
        return dispatch.combine_rows(dispatch.gather_rows(x_SD, order), chosen.weights_SA, order)

    return seconds_of(partial(jax.jit(run), x_SD, router_DE), repeats)


def precision(run: RunConfig, way: str, tokens: int) -> dict[str, float]:
    """Logits and gradients of bf16 with one attention beside those of fp32 with plain products, as shares of these."""
    params = jax.jit(partial(init_params, run.model))(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (1, tokens), 0, run.model.vocab_size, jnp.int32)
    found = {}
    for dtype, attends in (("float32", "xla"), ("bfloat16", way)):
        execution = dataclasses.replace(run.execution, compute_dtype=dtype, attention=attends)
        decoder = Decoder(run.model, execution)

        def loss(params: Any, decoder: Decoder = decoder) -> tuple[jax.Array, jax.Array]:
            logits: Any = decoder.apply({"params": params}, ids)
            return jnp.mean(
                jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
            ), logits

        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        flat = np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(gradients)])
        found[dtype] = (np.asarray(logits, np.float64), flat)
    (logits, gradients), (half_logits, half_gradients) = found["float32"], found["bfloat16"]
    return {
        "logits": float(np.max(np.abs(logits - half_logits)) / np.max(np.abs(logits))),
        "gradients": float(np.linalg.norm(gradients - half_gradients) / np.linalg.norm(gradients)),
    }


def decoding(run: RunConfig, tokens: int, repeats: int) -> float:
    """Tokens a second of one greedy text."""
    params = jax.jit(partial(init_params, run.model))(jax.random.key(0))
    model = ready(Model(run.model, params, run.execution))
    prompt = list(range(1, 17))
    settings = GenerateConfig(max_tokens=tokens)
    return tokens / seconds_of(lambda: generate(model, [prompt], settings), repeats)


def measure(tiny: bool, repeats: int) -> dict[str, Any]:
    """Everything, as rows of a table and as numbers."""
    rows, length, tokens = (2, 64, 128) if tiny else (16, 1024, 16_384)
    peak = matmul_peak(256 if tiny else 8192, repeats)
    found: dict[str, Any] = {"matmul_peak": peak, "training": {}, "layer": {}, "attention": {}, "precision": {}}
    table = [["matmul, bf16", "256²" if tiny else "8192²", f"{peak / 1e12:.1f} TFLOP/s", "100 %", ""]]
    ways = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)

    def add(what: str, shape: str, flops: float, aim: str) -> None:
        table.append([what, shape, f"{flops / 1e12:.2f} TFLOP/s", f"{flops / peak:.1%}", aim])

    for name, file in CONFIGS.items():
        for way in ways:
            for remat in ("none", "dots"):
                what, shape = f"training step, {name}, {way} attention, remat={remat}", f"{rows} × {length} tokens"
                try:
                    one = training(read(file, tiny, attention=way, remat=remat), rows, length, repeats)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    table.append([what, shape, "does not fit", "", AIMS[name]])
                    continue
                found["training"][what] = one
                add(what, shape, one["flops"], AIMS[name])
    if not found["training"]:
        raise SystemExit("no training step fits this device")
    shared = read(CONFIGS["shared MoE 49.6M"], tiny)
    for name in dispatch.DISPATCHES:
        if name == "reference":  # every expert on every token
            continue
        found["layer"][name] = expert_layer(shared.model, name, tokens, repeats)
        for part, flops in found["layer"][name].items():
            aim = "≥ 60 %" if name == shared.execution.dispatch else ""
            add(f"expert layer, {name}, {part}", f"{tokens:,} tokens, E=16, top-2", flops, aim)
    for way in ways:
        found["attention"][way] = attention(read(CONFIGS["dense 137.8M"], tiny), way, rows, length, repeats)
        for part, flops in found["attention"][way].items():
            add(f"attention, {way}, {part}", f"{rows} × {length} tokens, 12 heads of 64", flops, "")
    many, width, routed = (64, 64, 128) if tiny else (6144, 2048, 4096)
    found["routing_seconds"] = routing(routed, many, width, repeats)
    share = found["routing_seconds"] * peak / (6 * routed * ACTIVE * width * HIDDEN)
    what, shape = (
        "routing, of the experts' FLOPs at the matmul peak",
        f"{routed:,} tokens, E={many}, top-{ACTIVE}, D={width}",
    )
    table.append([what, shape, f"{found['routing_seconds'] * 1e3:.2f} ms", f"{share:.0%}", "≤ 25 %"])
    for name, file in CONFIGS.items():
        for way in ways:
            one = found["precision"][f"{name}, {way}"] = precision(read(file, tiny), way, 64 if tiny else 512)
            for what, difference in one.items():
                table.append([f"bf16 - fp32, {name}, {way} attention", f"of the {what}", f"{difference:.1e}", "", ""])
    found["decoding"] = {name: decoding(read(file, tiny), 8 if tiny else 128, 2) for name, file in CONFIGS.items()}
    for name, rate in found["decoding"].items():
        table.append([f"decoding, {name}", "one text, greedy", f"{rate:.0f} tokens/s", "", ""])
    return found | {"rows": table}


def main() -> None:
    """Measures, prints and writes the result."""
    given = options(__doc__, "gpu", repeats=10)
    device = jax.devices()[0].device_kind
    head = {"title": f"One {device}, bf16", "command": "./launch/gpu_bench.sh", "columns": COLUMNS}
    found = measure(given.tiny, given.repeats)
    publish(given.out, head | found | {"machine": device, "jax": jax.__version__})


if __name__ == "__main__":
    main()
