"""How cost grows with experts, tokens, layers and devices; and the cost of routing relative to the experts.

Routing is the router matmul, scores, top-k, sorting, gathering and combining rows; experts are the matmuls of sorted
rows alone. Where experts are computed, D is small (64), so that 6,144 experts with Qwen3's F fit a CPU. Routing at
Qwen3's own D is compared with the time of its experts' FLOPs at the rate of one large matmul, measured in the same run:
the router matmul alone is E / (3 · A · F), a third, of these FLOPs. Times are medians of alternating runs, each size in
its own process. Training steps are those of the shared MoE in configs/cpu_pair.py, with one number changed at a time:
real steps, and compiled bytes per device. Simulated devices share the cores, so their tokens/s show the cost of
communication, not the gain.

Command: python launch/bench_scale.py    (writes docs/results/scale; --tiny for a quick check)
"""

import os

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import apart, medians, options, publish

from moe_reduce.commands import config_file
from moe_reduce.core.config import ExecutionConfig, MeshConfig, MoEConfig
from moe_reduce.models.moe import expert_loop
from moe_reduce.models.moe.assignments import combine_rows, gather_rows, sort_by_expert
from moe_reduce.models.moe.routing import RouterWeights, Routing, route
from moe_reduce.models.weights import Weight
from moe_reduce.planning import footprint
from moe_reduce.reports import growth_picture
from moe_reduce.runs.train import pretraining
from moe_reduce.training import sharding, throughput

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "at", "measured", "aim"]
ACTIVE, FULL_WIDTH, HIDDEN = 8, 2048, 768  # of Qwen3-30B-A3B
WIDTH = 64  # where experts are computed
# sizes of the training steps
SIZES = {
    "layers": (2, 4, 8, 16), "experts": (4, 16, 64, 256), "length": (128, 256, 512, 1024), "data": (1, 2, 4),
    "expert": (1, 2, 4),
}  # fmt: skip
TINY_SIZES = {"layers": (2, 4), "expert": (1, 2)}
# label, and largest exponent allowed: attention is quadratic in sequence length
LABELS = {
    "layers": ("layers", "≤ n^1"), "experts": ("experts", "≤ n^1"), "length": ("tokens of a sequence", "≤ n^2"),
}  # fmt: skip


def _wait(function: Any, *arguments: Any) -> None:
    jax.block_until_ready(function(*arguments))


def routing_of(moe: MoEConfig, x_SD: jax.Array, router_DE: jax.Array) -> Routing:
    """Routing by a linear router without a selection bias."""
    return route(RouterWeights(Weight(router_DE, exact=True)).logits(x_SD), None, moe)


def routed(moe: MoEConfig, x_SD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """All of routing, summed to a differentiable scalar; rows are gathered and combined, without experts."""
    routing = routing_of(moe, x_SD, router_DE)
    order = sort_by_expert(routing.experts_SA, moe.experts)
    balance = jnp.sum(routing.probability_E * jax.lax.stop_gradient(routing.counts_E))
    return jnp.sum(combine_rows(gather_rows(x_SD, order), routing.weights_SA, order)) + balance


def routing_runs(moe: MoEConfig, x_SD: jax.Array, router_DE: jax.Array) -> dict[str, Any]:
    """Runs of routing: forward, and with gradients."""
    forward = partial(routed, moe)
    both = jax.jit(jax.grad(forward, argnums=(0, 1)))
    return {
        "routing": partial(_wait, jax.jit(forward), x_SD, router_DE),
        "routing, gradients": partial(_wait, both, x_SD, router_DE),
    }


def inputs(experts: int, tokens: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Random (x_SD, router_DE)."""
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (tokens, width)), jax.random.normal(keys[1], (width, experts)) * 0.1


def beside_flops(experts: int, tokens: int, width: int, repeats: int) -> dict[str, float]:
    """Time of routing relative to that of the experts' FLOPs, forward and with gradients of both."""
    moe = MoEConfig(experts=experts, active=ACTIVE, width=HIDDEN)
    seconds = medians(routing_runs(moe, *inputs(experts, tokens, width)), repeats)
    forward = 6 * tokens * ACTIVE * width * HIDDEN / throughput.measure(jax.devices()[0], "float32")
    return {
        "routing": seconds["routing"] / forward,
        "routing, gradients": seconds["routing, gradients"] / (3 * forward),
    }


def layer(experts: int, tokens: int, hidden: int, repeats: int) -> dict[str, float]:
    """Seconds of one MoE layer's routing and experts, each forward and with gradients."""
    keys = jax.random.split(jax.random.key(1), 3)
    moe = MoEConfig(experts=experts, active=ACTIVE, width=hidden)
    x_SD, router_DE = inputs(experts, tokens, WIDTH)
    sizes = ((experts, WIDTH, hidden), (experts, WIDTH, hidden), (experts, hidden, WIDTH))
    matrices = tuple(jax.random.normal(key, size) * 0.05 for key, size in zip(keys, sizes, strict=True))
    tile_rows = expert_loop.tile_rows(ExecutionConfig().block_rows, tokens * ACTIVE, experts)
    settings = expert_loop.Settings(tile_rows, "plain")

    def computed(rows_MD: jax.Array, counts_E: jax.Array, matrices: Any) -> jax.Array:
        made: Any = expert_loop.loop_swiglu(rows_MD, counts_E, matrices, (), {}, settings)
        return jnp.sum(made[0])

    order = sort_by_expert(
        route(RouterWeights(Weight(router_DE, exact=True)).logits(x_SD), None, moe).experts_SA, experts
    )
    rows_MD = gather_rows(x_SD, order)
    runs = routing_runs(moe, x_SD, router_DE) | {
        "experts": partial(_wait, jax.jit(computed), rows_MD, order.counts_E, matrices),
        "experts, gradients": partial(_wait, jax.jit(jax.grad(computed)), rows_MD, order.counts_E, matrices),
    }
    return medians(runs, repeats)


def changed(run: Any, **numbers: int) -> Any:
    """The run with other numbers of layers, experts, tokens a sequence, or devices along an axis of the mesh."""
    model, data = run.model, run.data
    if "layers" in numbers:
        model = dataclasses.replace(model, layers=numbers["layers"])
    if "experts" in numbers:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts=numbers["experts"]))
    if "length" in numbers:
        data = dataclasses.replace(data, sequence_length=numbers["length"])
    train = dataclasses.replace(run.train, warmup_steps=0)  # so that the first step learns
    mesh = {axis: count for axis, count in numbers.items() if axis in sharding.AXES}
    execution = dataclasses.replace(run.execution, scan_unroll=1).resolve("cpu")
    mesh = MeshConfig(**{"data": 1} | mesh)
    return dataclasses.replace(run, model=model, data=data, train=train, execution=execution, mesh=mesh)


def step(run: Any, repeats: int) -> dict[str, float]:
    """Seconds and tokens/s of the run's training step, and the bytes that it needs on a device."""
    job, mesh = pretraining(run), sharding.make_mesh(run.mesh)
    planned = footprint.of(job, mesh)
    program = planned.program
    with jax.set_mesh(mesh):
        compiled = program.step.lower(program.state, planned.frozen, planned.batch).compile()
    sizes: Any = compiled.memory_analysis()
    rows = (job.train.batch_size, job.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, rows, dtype=np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(rows, np.float32)}
    losses = []
    # outside the mesh: initialisation runs the model on one token, which a mesh cannot divide
    held = [jax.jit(lambda: program.new_state(job.initial()), out_shardings=program.shardings)()]
    with jax.set_mesh(mesh):
        placed = sharding.put_batch(mesh, batch)

        def once() -> None:
            held[0], metrics = compiled(held[0], {}, placed)
            losses.append(float(metrics["loss"]))

        seconds = medians({"step": once}, repeats)["step"]
    if not losses[-1] < losses[0]:
        raise SystemExit(f"a step that does not learn is not worth measuring: losses {losses}")
    return {
        "seconds": seconds,
        "tokens/s": tokens.size / seconds,
        "held": sum(planned.held().values()),
        "temporaries": sizes.temp_size_in_bytes,
    }


def growth(points: dict[int, float]) -> str:
    """The exponent p of cost = a · n^p between the two largest sizes."""
    (small, low), (large, high) = list(points.items())[-2:]
    return f"cost ∝ n^{np.log(high / low) / np.log(large / small):.2f}"


def measure(tiny: bool, repeats: int) -> tuple[list[list[str]], dict[str, dict[str, dict[int, float]]]]:
    """Rows of the table, and curves by picture: label -> size -> value."""
    experts = (16, 64) if tiny else (16, 64, 256, 1024, 6144)
    tokens = (128, 256) if tiny else (512, 1024, 2048, 4096)
    hidden = 32 if tiny else HIDDEN
    by_experts = {count: apart(layer, count, tokens[-2], hidden, repeats) for count in experts}
    by_tokens = {count: apart(layer, experts[1], count, hidden, repeats) for count in tokens}
    run = config_file.read(str(ROOT / "configs/cpu_pair.py"), [])["shared_moe"]
    sizes = TINY_SIZES if tiny else SIZES
    by_step = {
        name: {count: apart(step, changed(run, **{name: count}), repeats) for count in counts}
        for name, counts in sizes.items()
    }
    rows = []
    many, width = experts[-1], WIDTH if tiny else FULL_WIDTH
    share = apart(beside_flops, many, tokens[-2], width, repeats)
    for name, what in (("", ""), (", gradients", ", with gradients")):
        for count in (experts[0], many):
            beside = by_experts[count][f"routing{name}"] / by_experts[count][f"experts{name}"]
            at, aim = f"E = {count}, top-{ACTIVE}, {tokens[-2]} tokens", "≤ 25 %" if count == many else ""
            rows.append([f"routing, of the experts' time{what}", at, f"{beside:.1%}", aim])
        at = f"E = {many}, top-{ACTIVE}, {tokens[-2]} tokens, D = {width}"
        found = f"{share[f'routing{name}']:.1%}"
        rows.append([f"routing, of the experts' FLOPs at a product's rate{what}", at, found, "≤ 25 %"])
    layer = {count: one["routing"] + one["experts"] for count, one in by_experts.items()}
    rows.append(["layer with experts", f"E = {experts[-2]} → {experts[-1]}", growth(layer), "≤ n^1"])
    routing = {count: one["routing"] for count, one in by_experts.items()}
    rows.append(["routing with experts", f"E = {experts[-2]} → {experts[-1]}", growth(routing), "≤ n^1"])
    moved = {count: one["routing"] + one["experts"] for count, one in by_tokens.items()}
    rows.append(["layer with tokens", f"T = {tokens[-2]} → {tokens[-1]}", growth(moved), "≤ n^1"])
    for name, points in by_step.items():
        counts = list(points)
        if name in sharding.AXES:
            for what, label in (("held", "parameters, optimiser and batch"), ("temporaries", "temporaries")):
                ratio = points[counts[-1]][what] / points[counts[0]][what]
                at = f"mesh.{name} = {counts[0]} → {counts[-1]}"
                rows.append([f"{label} of a device", at, f"{ratio:.2f}×", ""])
        else:
            seconds = {count: one["seconds"] for count, one in points.items()}
            what, aim = LABELS[name]
            rows.append([f"training step with {what}", f"{name} = {counts[-2]} → {counts[-1]}", growth(seconds), aim])
    curves = {
        "seconds of a layer, by experts": {
            name: {n: one[name] for n, one in by_experts.items()} for name in by_experts[experts[0]]
        },
        "seconds of a layer, by tokens": {
            name: {n: one[name] for n, one in by_tokens.items()} for name in by_tokens[tokens[0]]
        },
        "tokens/s of a training step": {
            name: {n: one["tokens/s"] for n, one in points.items()} for name, points in by_step.items()
        },
        "bytes of a device": {
            f"{what}, by {name}": {n: one[what] for n, one in points.items()}
            for name, points in by_step.items()
            for what in ("held", "temporaries")
        },
    }
    return rows, curves


def main() -> None:
    """Measures, prints and writes the result."""
    given = options(__doc__, "scale", repeats=5)
    rows, curves = measure(given.tiny, given.repeats)
    result = {
        "title": "How cost grows, CPU, fp32",
        "command": "python launch/bench_scale.py",
        "columns": COLUMNS,
        "rows": rows,
        "curves": curves,
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    publish(given.out, result)
    growth_picture.picture(curves, given.out / "growth.png")


if __name__ == "__main__":
    main()
