"""What one accelerator makes of the models: MFU of training, the expert layer, attention, decoding, bf16 beside fp32.

Everything is stated against a bf16 matmul measured in the same run. Training steps are those of the configurations, at
METHODS' batch for each of 32 devices (16 sequences of 1,024 tokens), with the loop's own program and its layers
unrolled. All programs are compiled first, side by side. A step that does not fit is a row that says so; anything else
that fails is an error, and that no step fits. Needs jax for the device, flax, optax and ml-collections, nothing else.

Command: ./launch/gpu_bench.sh    (writes docs/results/gpu/summary.json; --tiny checks the script on a CPU)
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import check_learning, options, publish

from moe_reduce import planning
from moe_reduce.commands import config_file
from moe_reduce.config import GenerateConfig, MeshConfig, MoEConfig, RunConfig
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models import dispatch
from moe_reduce.models.decoder import Decoder, init_params
from moe_reduce.models.layers import causal_attention
from moe_reduce.models.routing import route, router_logits
from moe_reduce.storage.model import Model
from moe_reduce.training import losses, sharding, steps

T = TypeVar("T")
Run = Callable[[], Any]

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "shape", "measured", "of the matmul peak", "aim"]
CONFIGS = {"dense 137.8M": "dense_llama_125m.py", "shared MoE 49.6M": "shared_moe_50m.py"}
AIMS = {"dense 137.8M": "≥ 50 %", "shared MoE 49.6M": "≥ 35 %"}
PRECISIONS = {"logits": "largest difference, of the largest logit", "gradients": "norm of the difference, of the norm"}
SLOW = "reference"  # every expert on every token


class Layer(NamedTuple):
    """The size of an expert layer, and of what it is given."""

    experts: int
    active: int
    width: int
    hidden: int
    tokens: int

    def flops(self) -> float:
        """Of its products, forward."""
        return 6.0 * self.tokens * self.active * self.width * self.hidden

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, E={self.experts}, top-{self.active}, D={self.width}, F={self.hidden}"


LAYERS = {"shared MoE 49.6M": Layer(16, 2, 768, 720, 16_384), "Qwen3-30B-A3B": Layer(128, 8, 2048, 768, 8192)}
POOL = Layer(6144, 8, 2048, 768, 4096)  # all experts of Qwen3-30B-A3B
NARROW_POOL = POOL._replace(width=512, hidden=192)  # whose experts fit the device
TINY = Layer(8, 2, 64, 48, 64)


def seconds_of(run: Run, repeats: int) -> float:
    """Median seconds of a run, after two to warm up. Short ones are timed many in a row: the wait for the device costs
    as much."""

    def timed(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - started) / times

    timed(1)
    times = max(1, round(0.03 / timed(1)))
    return float(np.median([timed(times) for _ in range(repeats)]))


def compiled(function: Callable[..., Any], *arguments: Any) -> Run:
    """A call of the function, compiled now."""
    return partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """What comes back to all arguments of the function; its first is the cotangent as well."""
    return lambda *arguments: jax.vjp(function, *arguments)[1](arguments[0])


def if_it_fits(function: Callable[..., T], *arguments: Any) -> T | None:
    """function(*arguments), or None where the device has not the memory."""
    try:
        return function(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise


def matmul(size: int) -> Run:
    """Ten square products in a row, in bf16 with fp32 sums, on random values: zeros draw less power."""
    x, matrix = (jax.random.normal(jax.random.key(number), (size, size), jnp.bfloat16) for number in range(2))

    def chain(x: jax.Array, matrix: jax.Array) -> jax.Array:
        for _ in range(10):
            x = x @ matrix
        return x

    return compiled(chain, x, matrix * jnp.bfloat16(size**-0.5))


def read(file: str, tiny: bool, **execution: Any) -> RunConfig:
    """A configuration for this platform."""
    small = ["--config.model.layers=2", "--config.model.vocab_size=512"] if tiny else []
    (run,) = config_file.read(str(ROOT / "configs" / file), small).values()
    wanted = dataclasses.replace(run.execution, platform="auto", scan_unroll=run.model.layers, **execution)
    return dataclasses.replace(run, execution=wanted.resolve(jax.default_backend()))


class Training:
    """Training steps of a run on random tokens, one a call, compiled now."""

    def __init__(self, run: RunConfig, rows: int, length: int):
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=rows, warmup_steps=0))
        task = losses.language_model_task(run.model, run.execution, run.balance)
        initial = partial(init_params, run.model, jax.random.key(0))
        self.mesh = sharding.make_mesh(MeshConfig(data=1))
        program = steps.program(task, run.train, self.mesh, jax.eval_shape(initial))
        self.new_state = jax.jit(lambda: program.new_state(initial()), out_shardings=program.places)
        tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (rows, length + 1), dtype=np.int32)
        weights = np.ones((rows, length), np.float32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
        self.batch = sharding.put_batch(self.mesh, batch)
        with jax.set_mesh(self.mesh):
            self.step = program.step.lower(program.state, {}, self.batch).compile()
        self.state: Any = None
        self.losses: list[jax.Array] = []
        self.model, self.tokens = run.model, rows * length
        self.flops = planning.train_flops_per_token(run.model, length) * self.tokens

    def __call__(self) -> jax.Array:
        self.state, metrics = self.step(self.state, {}, self.batch)
        self.losses.append(metrics["loss"])
        return metrics["loss"]

    def measure(self, repeats: int) -> dict[str, float]:
        """Tokens a second and FLOP/s of a step, which must learn."""
        self.state = self.new_state()
        seconds = seconds_of(self, repeats)
        check_learning("the training step", [float(loss) for loss in self.losses], self.model.vocab_size)
        self.state = None
        return {"tokens_per_second": self.tokens / seconds, "flops": self.flops / seconds}


def expert_layer(layer: Layer, name: str) -> dict[str, Run]:
    """The expert layer in bf16 under one dispatch, forward and with gradients; tokens choose evenly at random."""
    experts, width, hidden = layer.experts, layer.width, layer.hidden
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    drawn = (jax.random.normal(key, size) * 0.02 for key, size in zip(keys[:3], sizes, strict=True))
    x_SD = jax.random.normal(keys[3], (layer.tokens, width), jnp.bfloat16)
    weights_SA, chosen_SA = jax.lax.top_k(jax.random.uniform(keys[4], (layer.tokens, experts)), layer.active)
    execution = read(CONFIGS["shared MoE 49.6M"], tiny=False, dispatch=name, compute_dtype="bfloat16").execution

    def apply(x_SD: jax.Array, matrices: dispatch.Experts, chosen_SA: jax.Array, weights_SA: jax.Array) -> jax.Array:
        pool = dispatch.Pool.of(matrices, jnp.dtype("bfloat16"))
        return dispatch.DISPATCHES[name](x_SD, chosen_SA, weights_SA, pool, execution).y_SD

    def both(x_SD: jax.Array, matrices: dispatch.Experts, chosen_SA: jax.Array, weights_SA: jax.Array) -> Any:
        return with_gradient(lambda x, matrices, weights: apply(x, matrices, chosen_SA, weights))(
            x_SD, matrices, weights_SA
        )

    arguments = (x_SD, dispatch.Experts(*drawn), chosen_SA.astype(jnp.int32), weights_SA)
    return {"forward": compiled(apply, *arguments), "forward and backward": compiled(both, *arguments)}


def attention(run: RunConfig, way: str, rows: int, length: int) -> dict[str, Run]:
    """One layer's attention in bf16, forward and with gradients."""
    model = run.model
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (model.query_heads, model.key_value_heads, model.key_value_heads)
    given = [
        jax.random.normal(key, (rows, length, count, model.head_width), jnp.bfloat16)
        for key, count in zip(keys, heads, strict=True)
    ]

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if way == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return causal_attention(q, k, v, None, run.execution.products)

    return {"forward": compiled(mix, *given), "forward and backward": compiled(with_gradient(mix), *given)}


def routing(layer: Layer) -> Run:
    """The router's product, the choice, sorting, and moving rows there and back."""
    x_SD = jax.random.normal(jax.random.key(0), (layer.tokens, layer.width), jnp.bfloat16)
    router_DE = jax.random.normal(jax.random.key(1), (layer.width, layer.experts)) * 0.1
    moe = MoEConfig(experts=layer.experts, active=layer.active, width=layer.hidden)

    def run(x_SD: jax.Array, router_DE: jax.Array) -> jax.Array:
        chosen = route(router_logits(x_SD, router_DE, None), None, moe)
        order = dispatch.sort_by_expert(chosen.experts_SA, layer.experts)
        return dispatch.combine_rows(dispatch.gather_rows(x_SD, order), chosen.weights_SA, order)

    return compiled(run, x_SD, router_DE)


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
            return jnp.mean(losses.negative_log_likelihood(logits, ids)), logits

        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        flat = np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(gradients)])
        found[dtype] = (np.asarray(logits, np.float64), flat)
    (logits, gradients), (half_logits, half_gradients) = found["float32"], found["bfloat16"]
    return {
        "logits": float(np.max(np.abs(logits - half_logits)) / np.max(np.abs(logits))),
        "gradients": float(np.linalg.norm(gradients - half_gradients) / np.linalg.norm(gradients)),
    }


def decoding(run: RunConfig, tokens: int) -> Run:
    """One greedy text."""
    params = jax.jit(partial(init_params, run.model))(jax.random.key(0))
    model = ready(Model(run.model, params, run.execution))
    write = partial(generate, model, [list(range(1, 17))], GenerateConfig(max_tokens=tokens))
    write()
    return write


def measure(tiny: bool, repeats: int) -> dict[str, Any]:
    """Everything, as rows of a table and as numbers."""
    rows, length, size, text = (2, 64, 256, 8) if tiny else (16, 1024, 8192, 128)
    layers = dict.fromkeys(LAYERS, TINY) if tiny else LAYERS
    pool, narrow = (TINY, TINY) if tiny else (POOL, NARROW_POOL)
    ways = {"xla": ("none",), "cudnn": ("none", "dots")} if jax.default_backend() == "gpu" else {"xla": ("none",)}
    best = list(ways)[-1]
    usual = read(CONFIGS["shared MoE 49.6M"], tiny).execution.dispatch
    dispatches = [name for name in dispatch.DISPATCHES if name != SLOW]

    builds: dict[tuple[str, ...], Callable[[], Any]] = {("matmul",): partial(matmul, size)}
    for name, file in CONFIGS.items():
        for way, kept in ways.items():
            for remat in kept:
                run = read(file, tiny, attention=way, remat=remat)
                builds["training", name, way, remat] = partial(if_it_fits, Training, run, rows, length)
            run = read(file, tiny)
            builds["precision", name, way] = partial(precision, run, way, 64 if tiny else 512)
        builds["decoding", name] = partial(decoding, read(file, tiny), text)
    for shape, layer in layers.items():
        for name in dispatches if shape == next(iter(layers)) else [usual]:
            builds["layer", shape, name] = partial(expert_layer, layer, name)
    for way in ways:
        builds["attention", way] = partial(attention, read(CONFIGS["dense 137.8M"], tiny), way, rows, length)
    builds["routing", "wide"] = partial(routing, pool)
    builds["routing", "narrow"] = partial(routing, narrow)
    builds["layer", "narrow", usual] = partial(expert_layer, narrow, usual)
    failed: list[str] = []

    def attempt(what: Any, function: Callable[[], T]) -> T | None:
        """What one part gives, or None and a line for the end: the others are still worth having."""
        try:
            return function()
        except Exception as error:
            failed.append(f"{what}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
            return None

    with ThreadPoolExecutor() as threads:
        futures = {key: threads.submit(attempt, key, build) for key, build in builds.items()}
        built = {key: future.result() for key, future in futures.items()}
    of_kind = {kind: {} for kind, *_ in built}
    for (kind, *rest), one in built.items():
        of_kind[kind][tuple(rest)] = one

    table: list[list[str]] = []

    def row(*cells: str) -> None:
        table.append(list(cells))
        print(*cells, sep="  ", file=sys.stderr, flush=True)  # a run that breaks off has shown something

    def seconds(run: Run | None) -> float:
        return float("nan") if run is None else attempt(run, partial(seconds_of, run, repeats)) or float("nan")

    peak = 20 * size**3 / seconds(built["matmul",])

    def add(what: str, shape: str, flops: float, aim: str = "") -> None:
        row(what, shape, f"{flops / 1e12:.2f} TFLOP/s", f"{flops / peak:.1%}", aim)

    add("matmul", f"{size}²", peak)
    found: dict[str, Any] = {"matmul_peak": peak, "training": {}, "layer": {}, "attention": {}, "decoding": {}}
    for (name, way, remat), program in of_kind["training"].items():
        what, shape = f"training step, {name}, {way} attention, remat={remat}", f"{rows} × {length} tokens"
        one = None if program is None else attempt(what, partial(if_it_fits, program.measure, repeats))
        if one is None:
            row(what, shape, "does not fit", "", AIMS[name])
        else:
            found["training"][what] = one
            add(what, shape, one["flops"], AIMS[name] if way == best else "")
    for (shape, name), parts in of_kind["layer"].items():
        for part, run in (parts or {}).items() if shape in layers else ():
            flops = layers[shape].flops() * (1 if part == "forward" else 3) / seconds(run)
            found["layer"][f"{shape}, {name}, {part}"] = flops
            add(f"expert layer, {name}, {part}", str(layers[shape]), flops, "≥ 60 %" if name == usual else "")
    model = read(CONFIGS["dense 137.8M"], tiny).model
    causal = 2.0 * rows * length**2 * model.query_heads * model.head_width
    for (way,), parts in of_kind["attention"].items():
        for part, run in (parts or {}).items():
            flops = found["attention"][f"{way}, {part}"] = causal * (1 if part == "forward" else 3) / seconds(run)
            add(f"attention, {way}, {part}", f"{rows} × {length} tokens, 12 heads of 64", flops)
    wide_seconds, narrow_seconds = (seconds(of_kind["routing"][which,]) for which in ("wide", "narrow"))
    experts_seconds = seconds((of_kind["layer"]["narrow", usual] or {}).get("forward"))
    found["routing"] = {
        "wide_seconds": wide_seconds, "of_flops_at_peak": wide_seconds * peak / pool.flops(),
        "narrow_seconds": narrow_seconds, "of_measured": narrow_seconds / experts_seconds,
    }  # fmt: skip
    share = f"{found['routing']['of_measured']:.0%} of the experts"
    row("routing", str(narrow), f"{narrow_seconds * 1e3:.2f} ms", share, "≤ 25 %")
    share = f"{found['routing']['of_flops_at_peak']:.0%} of the experts' FLOPs at the peak"
    row("routing", str(pool), f"{wide_seconds * 1e3:.2f} ms", share, "")
    found["precision"] = {", ".join(key): one for key, one in of_kind["precision"].items() if one is not None}
    for key, one in found["precision"].items():
        for what, difference in one.items():
            row(f"bf16 beside fp32, {key}", PRECISIONS[what], f"{difference:.1e}", "", "")
    for (name,), write in of_kind["decoding"].items():
        rate = found["decoding"][name] = text / seconds(write)
        row(f"decoding, {name}", "one text, greedy", f"{rate:.0f} tokens/s", "", "")
    if not found["training"]:
        failed.append("no training step fits this device")
    return found | {"rows": table, "failed": failed}


def main() -> None:
    """Measures, prints and writes the result, which says what failed; if anything did, that is an error."""
    given = options(__doc__, "gpu", repeats=10)
    device = jax.devices()[0].device_kind
    head = {"title": f"One {device}, bf16", "command": "./launch/gpu_bench.sh", "columns": COLUMNS}
    found = measure(given.tiny, given.repeats)
    publish(given.out, head | found | {"machine": device, "jax": jax.__version__})
    if found["failed"]:
        raise SystemExit("these failed: " + "; ".join(found["failed"]))


if __name__ == "__main__":
    main()
