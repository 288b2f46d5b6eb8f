"""How cost grows: with experts, tokens, layers and devices; and what routing costs beside the experts themselves.

Routing is the router's product, scores, top-k, sorting, and moving rows there and back; experts: the products of the
sorted rows alone. Width is small (64), so that 6,144 experts of Qwen3's hidden width fit a CPU; the share that routing
has of the FLOPs, E / (3 · A · F), does not depend on it. Times are medians, in turn, in one process. Bytes of a device
are those of the compiled training step of configs/cpu_pair.py's shared mixture over 1, 2, 4 and 8 simulated devices.

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
from side_by_side import medians, options, publish

from moe_reduce import drawing
from moe_reduce.commands import config_file
from moe_reduce.config import MeshConfig, MoEConfig
from moe_reduce.models import blocks
from moe_reduce.models.dispatch import combine_rows, gather_rows, sort_by_expert
from moe_reduce.models.routing import route, router_logits
from moe_reduce.training import compiled, footprint, sharding, steps
from moe_reduce.training.run import pretraining

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "at", "measured", "aim"]
ACTIVE, WIDTH, HIDDEN = 8, 64, 768  # of Qwen3-30B-A3B, but for the width


def _wait(function: Any, *arguments: Any) -> None:
    jax.block_until_ready(function(*arguments))


def layer(experts: int, tokens: int, hidden: int, repeats: int) -> dict[str, float]:
    """Seconds of routing, and of the experts, forward and with gradients, of one mixture."""
    keys = jax.random.split(jax.random.key(0), 5)
    moe = MoEConfig(experts=experts, active=ACTIVE, width=hidden)
    x_SD = jax.random.normal(keys[0], (tokens, WIDTH))
    router_DE = jax.random.normal(keys[1], (WIDTH, experts)) * 0.1
    sizes = ((experts, WIDTH, hidden), (experts, WIDTH, hidden), (experts, hidden, WIDTH))
    matrices = tuple(jax.random.normal(key, size) * 0.05 for key, size in zip(keys[2:], sizes, strict=True))

    def routed(x_SD: jax.Array, router_DE: jax.Array) -> tuple[jax.Array, jax.Array]:
        routing = route(router_logits(x_SD, router_DE, None), None, moe)
        order = sort_by_expert(routing.experts_SA, experts)
        balance = jnp.sum(routing.probability_E * jax.lax.stop_gradient(routing.counts_E))
        return jnp.sum(combine_rows(gather_rows(x_SD, order), routing.weights_SA, order)), balance

    def computed(rows_MD: jax.Array, counts_E: jax.Array, matrices: Any) -> jax.Array:
        made: Any = blocks.grouped_swiglu(rows_MD, counts_E, matrices, (), {}, 64, "plain")
        return jnp.sum(made[0])

    order = sort_by_expert(route(router_logits(x_SD, router_DE, None), None, moe).experts_SA, experts)
    rows_MD = gather_rows(x_SD, order)
    both = jax.jit(jax.grad(lambda *arguments: sum(routed(*arguments)), argnums=(0, 1)))
    runs = {
        "routing": partial(_wait, jax.jit(routed), x_SD, router_DE),
        "experts": partial(_wait, jax.jit(computed), rows_MD, order.counts_E, matrices),
        "routing, gradients": partial(_wait, both, x_SD, router_DE),
        "experts, gradients": partial(_wait, jax.jit(jax.grad(computed)), rows_MD, order.counts_E, matrices),
    }
    return medians(runs, repeats)


def step_seconds(run: Any, layers: int, repeats: int) -> float:
    """Seconds of a training step of the shared mixture with so many layers."""
    execution = dataclasses.replace(run.execution, scan_unroll=1).resolve("cpu")
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=layers), execution=execution)
    job = pretraining(changed)
    mesh = sharding.make_mesh(MeshConfig(data=1))
    program = steps.program(job.task, job.train, mesh, jax.eval_shape(job.initial))
    rows = (job.train.batch_size, job.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, changed.model.vocab_size, rows, dtype=np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(rows, np.float32)}
    placed = sharding.put_batch(mesh, batch)
    state = jax.jit(lambda: program.new_state(job.initial()), out_shardings=program.places)()
    held = [state]

    def once() -> None:
        held[0], metrics = program.step(held[0], {}, placed)
        jax.block_until_ready(metrics["loss"])

    return medians({"step": once}, repeats)["step"]


def device_bytes(run: Any, axis: str, devices: int) -> dict[str, Any]:
    """What the compiled step of the shared mixture takes on each of so many devices along one axis of the mesh."""
    sizes = {"data": 1} | {axis: devices}
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    job = pretraining(dataclasses.replace(run, execution=run.execution.resolve("cpu")))
    found = compiled.compile_step(job, mesh, memory=2**34)
    return found | {"held": sum(footprint.of(job, mesh).held().values())}


def growth(points: dict[int, float]) -> str:
    """The exponent p of cost = a · n^p between the two largest sizes."""
    (small, low), (large, high) = list(points.items())[-2:]
    return f"cost ∝ n^{np.log(high / low) / np.log(large / small):.2f}"


def measure(tiny: bool, repeats: int) -> tuple[list[list[str]], dict[str, dict[str, dict[int, float]]]]:
    """Rows of the table, and curves by picture: label -> size -> value."""
    experts = (16, 64) if tiny else (16, 64, 256, 1024, 6144)
    tokens = (128, 256) if tiny else (512, 1024, 2048, 4096)
    hidden = 32 if tiny else HIDDEN
    by_experts = {count: layer(count, tokens[-2], hidden, repeats) for count in experts}
    by_tokens = {count: layer(experts[1], count, hidden, repeats) for count in tokens}
    run = config_file.read(str(ROOT / "configs/cpu_pair.py"), [])["shared_moe"]
    by_layers = {count: step_seconds(run, count, repeats) for count in ((2, 4) if tiny else (2, 4, 8, 16))}
    axes = ("data", "expert")
    by_devices = {axis: {count: device_bytes(run, axis, count) for count in (1, 2, 4)} for axis in axes}
    rows = []
    for name in ("", ", gradients"):
        for count in (experts[0], experts[-1]):
            share = by_experts[count][f"routing{name}"] / by_experts[count][f"experts{name}"]
            aim = "≤ 25 %" if count == experts[-1] else ""
            what = f"routing, of the experts' time{name.replace(', gradients', ', with gradients')}"
            rows.append([what, f"E = {count}, top-{ACTIVE}, {tokens[-2]} tokens", f"{share:.1%}", aim])
    whole = {count: one["routing"] + one["experts"] for count, one in by_experts.items()}
    rows.append(["layer with experts", f"E = {experts[-2]} → {experts[-1]}", growth(whole), "≤ n^1"])
    routing = {count: one["routing"] for count, one in by_experts.items()}
    rows.append(["routing with experts", f"E = {experts[-2]} → {experts[-1]}", growth(routing), "≤ n^1"])
    moved = {count: one["routing"] + one["experts"] for count, one in by_tokens.items()}
    rows.append(["layer with tokens", f"T = {tokens[-2]} → {tokens[-1]}", growth(moved), "≤ n^1"])
    rows.append(
        ["training step with layers", f"N = {[*by_layers][-2]} → {[*by_layers][-1]}", growth(by_layers), "≤ n^1"]
    )
    for axis in axes:
        one, last = by_devices[axis][1], by_devices[axis][4]
        for what in ("held", "temporaries_bytes"):
            label = {"held": "parameters, optimiser and batch", "temporaries_bytes": "temporaries"}[what]
            rows.append([f"{label} of a device", f"mesh.{axis} = 1 → 4", f"{last[what] / one[what]:.2f}×", ""])
    curves = {
        "seconds, by experts": {
            name: {n: one[name] for n, one in by_experts.items()} for name in by_experts[experts[0]]
        },
        "seconds, by tokens": {name: {n: one[name] for n, one in by_tokens.items()} for name in by_tokens[tokens[0]]},
        "seconds of a step, by layers": {"shared mixture": by_layers},
        "bytes of a device, by devices": {
            f"{what} ({axis})": {n: one[what] for n, one in by_devices[axis].items()}
            for axis in axes
            for what in ("held", "temporaries_bytes")
        },
    }
    return rows, curves


def draw(curves: dict[str, dict[str, dict[int, float]]], file: Path) -> None:
    """Each group of curves by itself, on logarithmic axes."""
    figure, panels = drawing.panels(2, 2, (11, 8))
    for (title, lines), axes in zip(curves.items(), panels.flat, strict=True):
        for label, points in lines.items():
            axes.loglog(list(points), list(points.values()), marker="o", label=label)
        axes.set_title(title)
        axes.legend(fontsize=8)
    drawing.save(figure, file)


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
    draw(curves, given.out / "growth.png")


if __name__ == "__main__":
    main()
