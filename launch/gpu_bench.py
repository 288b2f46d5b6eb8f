"""Speed of the models on one accelerator: training MFU, MoE layer, routing, attention, decoding; bf16 error.

FLOP/s are relative to a bf16 matmul measured in the same run. Training steps are those of the configurations, at the
published batch per device on 32 devices (16 sequences of 1,024 tokens), with the loop's own program and its layers
unrolled. A step that does not fit gets a row that says so; if no step fits, or anything else fails, that is an error.
Needs only jax for the device, flax, optax and ml-collections.

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

from moe_reduce.commands import config_file
from moe_reduce.core.config import GenerateConfig, MeshConfig, MoEConfig, RunConfig
from moe_reduce.inference.generate import generate, ready
from moe_reduce.models.attention import softmax
from moe_reduce.models.attention.visibility import Visibility
from moe_reduce.models.decoder import Decoder, init_params
from moe_reduce.models.model import Model
from moe_reduce.models.moe import dispatch
from moe_reduce.models.moe.assignments import combine_rows, gather_rows, sort_by_expert
from moe_reduce.models.moe.experts import Experts, Masters
from moe_reduce.models.moe.routing import RouterWeights, route
from moe_reduce.models.weights import Weight
from moe_reduce.planning.flops import train_flops_per_token
from moe_reduce.training import losses, sharding, steps

T = TypeVar("T")
Run = Callable[[], Any]

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "shape", "measured", "of the matmul peak", "aim"]
CONFIGS = {"dense 137.8M": "dense_llama_125m.py", "shared MoE 49.6M": "shared_moe_50m.py"}
AIMS = {"dense 137.8M": "≥ 50 %", "shared MoE 49.6M": "≥ 35 %"}
PRECISIONS = {"logits": "largest difference, of the largest logit", "gradients": "norm of the difference, of the norm"}
FAILED = object()  # in place of a result
STEP = {"remat": "none", "scan_unroll": 12}  # fastest where memory allows


class Layer(NamedTuple):
    """The sizes of an expert layer and its input."""

    experts: int
    active: int
    width: int
    hidden: int
    tokens: int

    def flops(self) -> float:
        """Forward FLOPs of its matmuls."""
        return 6.0 * self.tokens * self.active * self.width * self.hidden

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, E={self.experts}, top-{self.active}, D={self.width}, F={self.hidden}"


LAYERS = {"shared MoE 49.6M": Layer(16, 2, 768, 720, 16_384), "Qwen3-30B-A3B": Layer(128, 8, 2048, 768, 8192)}
POOL = Layer(6144, 8, 2048, 768, 4096)  # all experts of Qwen3-30B-A3B
NARROW_POOL = POOL._replace(width=512, hidden=192)  # narrow enough to fit the device
TINY = Layer(8, 2, 64, 48, 64)


def seconds_of(run: Run, repeats: int) -> float:
    """Median seconds of a run, after two warm-up runs. Short runs are timed many in a row, to spread the
    wait for the device."""

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
    """Compiles the function; returns a call with these arguments."""
    return partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Makes the function's VJP in all arguments; the first argument also serves as cotangent."""
    return lambda *arguments: jax.vjp(function, *arguments)[1](arguments[0])


def if_it_fits(function: Callable[..., T], *arguments: Any) -> T | None:
    """function(*arguments), or None if the device runs out of memory."""
    try:
        return function(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise


def matmul(size: int) -> Run:
    """Ten chained square matmuls in bf16 with fp32 sums, on random values: zeros draw less power."""
    x, matrix = (jax.random.normal(jax.random.key(number), (size, size), jnp.bfloat16) for number in range(2))

    def chain(x: jax.Array, matrix: jax.Array) -> jax.Array:
        for _ in range(10):
            x = x @ matrix
        return x

    return compiled(chain, x, matrix * jnp.bfloat16(size**-0.5))


def read(file: str, tiny: bool, **execution: Any) -> RunConfig:
    """Reads a configuration, resolved for this platform."""
    small = ["--config.model.layers=2", "--config.model.vocab_size=512"] if tiny else []
    (run,) = config_file.read(str(ROOT / "configs" / file), small).values()
    wanted = dataclasses.replace(run.execution, platform="auto", **execution)
    return dataclasses.replace(run, execution=wanted.resolve(jax.default_backend()))


class Training:
    """A compiled training step of a run on random tokens; each call runs it once."""

    def __init__(self, run: RunConfig, rows: int, length: int):
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=rows, warmup_steps=0))
        task = losses.language_model_task(run.model, run.execution, run.balance)
        initial = partial(init_params, run.model, jax.random.key(0))
        self.mesh = sharding.make_mesh(MeshConfig(data=1))
        program = steps.program(task, run.train, self.mesh, jax.eval_shape(initial))
        self.new_state = jax.jit(lambda: program.new_state(initial()), out_shardings=program.shardings)
        tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (rows, length + 1), dtype=np.int32)
        weights = np.ones((rows, length), np.float32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
        self.batch = sharding.put_batch(self.mesh, batch)
        with jax.set_mesh(self.mesh):
            self.step = program.step.lower(program.state, {}, self.batch).compile()
        self.state: Any = None
        self.losses: list[jax.Array] = []
        self.model, self.tokens = run.model, rows * length
        self.flops = train_flops_per_token(run.model, length) * self.tokens

    def __call__(self) -> jax.Array:
        self.state, metrics = self.step(self.state, {}, self.batch)
        self.losses.append(metrics["loss"])
        return metrics["loss"]

    def measure(self, repeats: int) -> dict[str, float]:
        """Tokens/s and FLOP/s of a step; raises if it does not learn."""
        self.state = self.new_state()
        seconds = seconds_of(self, repeats)
        check_learning("the training step", [float(loss) for loss in self.losses], self.model.vocab_size)
        self.state = None
        return {"tokens_per_second": self.tokens / seconds, "flops": self.flops / seconds}


def expert_layer(layer: Layer, name: str, gradients: bool = True) -> dict[str, Run]:
    """The expert layer in bf16 under one dispatch, forward and with gradients; tokens choose evenly at random."""
    experts, width, hidden = layer.experts, layer.width, layer.hidden
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    drawn = (jax.random.normal(key, size) * 0.02 for key, size in zip(keys[:3], sizes, strict=True))
    x_SD = jax.random.normal(keys[3], (layer.tokens, width), jnp.bfloat16)
    weights_SA, chosen_SA = jax.lax.top_k(jax.random.uniform(keys[4], (layer.tokens, experts)), layer.active)
    execution = read(CONFIGS["shared MoE 49.6M"], tiny=False, dispatch=name, compute_dtype="bfloat16").execution

    def apply(x_SD: jax.Array, masters: Masters, weights_SA: jax.Array, computed, chosen_SA) -> jax.Array:
        experts = Experts(*(Weight(value, layout=execution.products) for value in computed))
        rows = dispatch.Assigned(x_SD, chosen_SA, weights_SA)
        return dispatch.DISPATCHES[name](rows, experts, masters, execution).y_SD

    def both(x_SD, masters, weights_SA, computed, chosen_SA) -> Any:
        given = with_gradient(partial(apply, computed=computed, chosen_SA=chosen_SA))
        return given(x_SD, masters, weights_SA)

    # a step casts a pool once, for all layers
    masters = tuple(drawn)
    computed = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), masters)
    arguments = (x_SD, masters, weights_SA, computed, chosen_SA.astype(jnp.int32))
    programs = {"forward": compiled(apply, *arguments)}
    return programs | ({"forward and backward": compiled(both, *arguments)} if gradients else {})


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
        return softmax.attention(q, k, v, Visibility(model), softmax.Softmax(layout=run.execution.products))

    return {"forward": compiled(mix, *given), "forward and backward": compiled(with_gradient(mix), *given)}


def routing(layer: Layer) -> Run:
    """The router matmul, top-k, sorting, gathering rows and combining them."""
    x_SD = jax.random.normal(jax.random.key(0), (layer.tokens, layer.width), jnp.bfloat16)
    router_DE = jax.random.normal(jax.random.key(1), (layer.width, layer.experts)) * 0.1
    moe = MoEConfig(experts=layer.experts, active=layer.active, width=layer.hidden)

    def run(x_SD: jax.Array, router_DE: jax.Array) -> jax.Array:
        chosen = route(RouterWeights(Weight(router_DE, exact=True)).logits(x_SD), None, moe)
        order = sort_by_expert(chosen.experts_SA, layer.experts)
        return combine_rows(gather_rows(x_SD, order), chosen.weights_SA, order)

    return compiled(run, x_SD, router_DE)


def precision(run: RunConfig, way: str, tokens: int) -> dict[str, float]:
    """Relative errors of bf16 logits and gradients, with attention `way`, against fp32 with XLA attention."""
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
    """Greedy decoding of one text."""
    params = jax.jit(partial(init_params, run.model))(jax.random.key(0))
    model = ready(Model(run.model, params, run.execution))
    write = partial(generate, model, [list(range(1, 17))], GenerateConfig(max_tokens=tokens))
    write()
    return write


class Bench:
    """The parts: each compiles its programs in parallel and then measures them one by one.

    `result` holds all results so far; a failure adds a line to it, and the other parts go on.
    """

    def __init__(self, tiny: bool, repeats: int):
        self.tiny, self.repeats = tiny, repeats
        self.rows, self.length = (2, 64) if tiny else (16, 1024)
        self.ways = ("cudnn", "xla") if jax.default_backend() == "gpu" else ("xla",)
        self.usual = read(CONFIGS["shared MoE 49.6M"], tiny).execution.dispatch
        self.result: dict[str, Any] = {"rows": [], "failed": []}
        self.peak = float("nan")

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """Result of one part, or FAILED and a line on what went wrong."""
        try:
            return function()
        except Exception as error:
            line = f"{what}: {type(error).__name__}: {error}"
            self.result["failed"].append(line)
            print(line, file=sys.stderr, flush=True)
            return FAILED

    def built(self, builds: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
        """Results of all builds that did not fail."""
        with ThreadPoolExecutor() as threads:
            futures = {key: threads.submit(self.attempt, str(key), build) for key, build in builds.items()}
            made = {key: future.result() for key, future in futures.items()}
        return {key: one for key, one in made.items() if one is not FAILED}

    def measured(self, builds: dict[Any, Callable[[], dict[str, Run]]]) -> dict[Any, dict[str, float]]:
        """Seconds of each build's programs, by name."""
        return {
            key: {part: seconds_of(run, self.repeats) for part, run in runs.items()}
            for key, runs in self.built(builds).items()
        }

    def row(self, *cells: str) -> None:
        """Adds a row and prints it at once."""
        self.result["rows"].append(list(cells))
        print(*cells, sep="  ", file=sys.stderr, flush=True)

    def rate(self, what: str, shape: str, flops: float, aim: str = "") -> float:
        """Adds a row of FLOP/s; returns them."""
        self.row(what, shape, f"{flops / 1e12:.2f} TFLOP/s", f"{flops / self.peak:.1%}", aim)
        return flops

    def matmul(self) -> None:
        """Measures the peak FLOP/s."""
        size = 256 if self.tiny else 8192
        self.peak = self.result["matmul_peak"] = 20 * size**3 / seconds_of(matmul(size), self.repeats)
        self.rate("matmul", f"{size}²", self.peak)

    def training(self) -> None:
        """Training steps of both models with each attention."""
        wanted = [(name, way) for name in CONFIGS for way in self.ways]
        builds = {
            (name, way): partial(
                if_it_fits,
                Training,
                read(CONFIGS[name], self.tiny, **(STEP | {"attention": way})),
                self.rows,
                self.length,
            )
            for name, way in wanted
        }
        programs = self.built(builds)
        self.result["training"] = {}
        for name, way in wanted:
            what, shape = f"training step, {name}, {way} attention", f"{self.rows} × {self.length} tokens"
            one = programs.get((name, way), FAILED)
            if isinstance(one, Training):
                one = self.attempt(what, partial(if_it_fits, one.measure, self.repeats))
            if one is None or one is FAILED:
                self.row(what, shape, "failed" if one is FAILED else "does not fit", "", AIMS[name])
            else:
                self.result["training"][what] = one
                self.rate(what, shape, one["flops"], AIMS[name] if way == self.ways[0] else "")
        if not self.result["training"]:
            self.result["failed"].append("no training step fits this device")

    def layers(self) -> None:
        """The MoE layer of the shared MoE with each dispatch, and Qwen3's with the usual one."""
        shapes = dict.fromkeys(LAYERS, TINY) if self.tiny else LAYERS
        first = next(iter(shapes))
        others = {"reference"} if self.usual == "grouped" else {"reference", "grouped"}  # too slow; for GPUs only
        dispatches = [name for name in dispatch.DISPATCHES if name not in others]
        builds = {
            (shape, name): partial(expert_layer, layer, name)
            for shape, layer in shapes.items()
            for name in (dispatches if shape == first else [self.usual])
        }
        self.result["layer"] = {}
        for (shape, name), parts in self.measured(builds).items():
            for part, seconds in parts.items():
                flops = shapes[shape].flops() * (1 if part == "forward" else 3) / seconds
                aim = "≥ 60 %" if name == self.usual else ""
                self.result["layer"][f"{shape}, {name}, {part}"] = flops
                self.rate(f"expert layer, {name}, {part}", str(shapes[shape]), flops, aim)

    def attention(self) -> None:
        """Attention of one layer; FLOPs of the causal half only."""
        run = read(CONFIGS["dense 137.8M"], self.tiny)
        flops = 2.0 * self.rows * self.length**2 * run.model.query_heads * run.model.head_width
        builds = {way: partial(attention, run, way, self.rows, self.length) for way in self.ways}
        shape = f"{self.rows} × {self.length} tokens, 12 heads of 64"
        self.result["attention"] = {
            f"{way}, {part}": self.rate(
                f"attention, {way}, {part}", shape, flops * (1 if part == "forward" else 3) / seconds
            )
            for way, parts in self.measured(builds).items()
            for part, seconds in parts.items()
        }

    def routing(self) -> None:
        """Routing over thousands of experts, relative to their time at a width that fits, and to their FLOPs."""
        wide, narrow = (TINY, TINY) if self.tiny else (POOL, NARROW_POOL)
        found = self.measured(
            {
                "wide": lambda: {"routing": routing(wide)},
                "narrow": lambda: {"routing": routing(narrow)},
                "experts": partial(expert_layer, narrow, self.usual, gradients=False),
            }
        )
        if len(found) < 3:
            return  # `failed` has a line for the failure
        seconds, at = found["narrow"]["routing"], found["wide"]["routing"]
        beside = {"measured": seconds / found["experts"]["forward"], "flops_at_peak": at * self.peak / wide.flops()}
        self.result["routing"] = {"seconds": seconds, "wide_seconds": at} | beside
        self.row(
            "routing", str(narrow), f"{seconds * 1e3:.2f} ms", f"{beside['measured']:.0%} of the experts", "≤ 25 %"
        )
        share = f"{beside['flops_at_peak']:.0%} of the experts' FLOPs at the peak"
        self.row("routing", str(wide), f"{at * 1e3:.2f} ms", share, "")

    def precision(self) -> None:
        """Errors of bf16 against fp32."""
        builds = {
            f"{name}, {way}": partial(precision, read(file, self.tiny), way, 64 if self.tiny else 512)
            for name, file in CONFIGS.items()
            for way in self.ways
        }
        self.result["precision"] = self.built(builds)
        for key, one in self.result["precision"].items():
            for what, difference in one.items():
                self.row(f"bf16 beside fp32, {key}", PRECISIONS[what], f"{difference:.1e}", "", "")

    def decoding(self) -> None:
        """Decoding of one text at a time."""
        tokens = 8 if self.tiny else 128
        self.result["decoding"] = {}
        for name, write in self.built(
            {name: partial(decoding, read(file, self.tiny), tokens) for name, file in CONFIGS.items()}
        ).items():
            rate = self.result["decoding"][name] = tokens / seconds_of(write, 2)
            self.row(f"decoding, {name}", "one text, greedy", f"{rate:.0f} tokens/s", "", "")


PARTS = (Bench.matmul, Bench.training, Bench.layers, Bench.routing, Bench.attention, Bench.precision, Bench.decoding)


def main() -> None:
    """Measures, prints and writes the result, even if stopped or if a part fails; then exits with an error."""
    given = options(__doc__, "gpu", repeats=10)
    device = jax.devices()[0].device_kind
    bench = Bench(given.tiny, given.repeats)
    try:
        for part in PARTS:
            bench.attempt(part.__name__, partial(part, bench))
            if np.isnan(bench.peak):
                break  # no peak to compare the others with
    except KeyboardInterrupt:
        bench.result["failed"].append("stopped")
    head = {"title": f"One {device}, bf16", "command": "./launch/gpu_bench.sh", "columns": COLUMNS}
    publish(given.out, head | bench.result | {"machine": device, "jax": jax.__version__})
    if bench.result["failed"]:
        raise SystemExit("these failed: " + "; ".join(bench.result["failed"]))


if __name__ == "__main__":
    main()
