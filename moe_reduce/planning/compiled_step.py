"""Compile a training step for devices that need not be present; report memory and cost as the compiler states them."""

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from moe_reduce.planning import footprint
from moe_reduce.training.job import Job

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]")
OPERATION = re.compile(r"[\])}] ([a-z-]+)\(")
UNKNOWN = 2**63 - 1  # stands for a missing estimate
MOST = 10  # number of sources of estimated cycles in a report
BITS = {"pred": 8, "bf16": 16}


def compile_step(job: Job, mesh: Mesh, memory: int) -> dict[str, Any]:
    """Report of one training step on each device of the mesh: bytes by kind, collectives, and whether it fits.

    memory: bytes of a device.
    """
    step = footprint.of(job, mesh)
    started = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = step.program.step.lower(step.program.state, step.frozen, step.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"total memory required.*?\(([\d.]+\w)\).*?\(([\d.]+\w)\)", str(error))
        reason = {"needed": needed[1], "available": needed[2]} if needed else {"compiler": str(error).splitlines()[0]}
        return {"fits": False, "held_bytes": step.held(), **reason, "remedy": step.remedy(memory)}
    sizes: Any = compiled.memory_analysis()
    peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total = peak + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    program = _text(compiled)
    cycles = estimated_cycles(program)
    report = {
        "fits": total <= memory,
        "bytes": total,
        "share_of_memory": round(total / memory, 4),
        "arguments_bytes": sizes.argument_size_in_bytes,
        "held_bytes": step.held(),
        "temporaries_bytes": sizes.temp_size_in_bytes,
        "program_bytes": sizes.generated_code_size_in_bytes,
        "model_flops": model_flops(job, mesh.size),
        "collectives": collectives(program),
        "estimated_cycles": {"total": sum(cycles.values()), "most": dict(list(cycles.items())[:MOST])},
        "compile_seconds": round(time.perf_counter() - started, 1),
    }
    return report if report["fits"] else report | {"remedy": step.remedy(memory)}


def _text(compiled: Any) -> str:
    """The optimised program; an empty one if the compiler cannot print it, as libtpu 0.0.52 for v5p and v6e."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        print(f"collectives and cycles are unknown: the compiler does not print the program ({error})", file=sys.stderr)
        return "ENTRY main () {"


def model_flops(job: Job, devices: int) -> float | None:
    """FLOPs of a step on each device, forward and backward, without recomputation; None if the job counts none."""
    if job.flops_per_token is None:
        return None
    return job.train.batch_size * job.data.sequence_length * job.flops_per_token / devices


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Collectives that one device runs in a step: {type: {"count", "bytes"}}; every loop iteration counts.

    bytes: total size of the results.
    """
    count: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for line, name, times in _executed(_computations(hlo)):
        if name in COLLECTIVES:
            count[name] += times
            moved[name] += times * _result_bytes(line)
    return {name: {"count": count[name], "bytes": moved[name]} for name in COLLECTIVES if count[name]}


def estimated_cycles(hlo: str) -> dict[str, int]:
    """Estimated cycles of a step on one device, by source in the model, largest first; from the TPU compiler only.

    Every loop iteration counts; {} from other compilers. Only elementwise passes over memory have estimates; kernels,
    products, gathers and scatters have none.
    """
    found: Counter[str] = Counter()
    # on some chips fused instructions have estimates too, which the fusion's estimate includes
    for line, name, times in _executed(_computations(hlo), fused=False):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles and int(cycles[1]) != UNKNOWN:
            source = re.search(r'op_name="([^"]*)"', line)
            found[source[1] if source else name] += times * int(cycles[1])
    return dict(found.most_common())


def _computations(hlo: str) -> dict[str, list[str]]:
    """Instructions of each computation by its name; the entry computation is named "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            lines = found["ENTRY" if head[1] else head[2]] = []
        elif " = " in line:
            lines.append(line)
    return found


def _executed(
    computations: dict[str, list[str]], computation: str = "ENTRY", times: int = 1, fused: bool = True
) -> Iterator[tuple[str, str, int]]:
    """(instruction, operation, number of runs) of every instruction that a computation runs.

    fused: whether to include the instructions inside fusions.
    """
    for line in computations[computation]:
        operation = OPERATION.search(line)
        name = operation[1].removesuffix("-start") if operation else ""
        # TPU fuses an all-reduce with the slice that the device keeps; such a fusion moves only that slice
        if re.search(r"calls=%?all-reduce-scatter", line):
            yield line, "reduce-scatter", times
            continue
        yield line, name, times
        if name == "fusion" and not fused:
            continue
        for called, repeats in _called(computations, line, name):
            yield from _executed(computations, called, times * repeats, fused)


def _called(computations: dict[str, list[str]], line: str, operation: str) -> Iterator[tuple[str, int]]:
    """(computation, number of runs) of each computation that an instruction calls, except scalar reducers."""
    if operation == "while":
        condition = re.search(r"condition=%?([\w.-]+)", line)
        body = re.search(r"body=%?([\w.-]+)", line)
        assert condition is not None
        assert body is not None
        known = re.search(r"known_trip_count\W+n\W+(\d+)", line)
        # the constant that the counter is compared with; 1 if the bound is computed
        bounds = [
            int(n) for text in computations[condition[1]] for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
        ]
        yield body[1], int(known[1]) if known else max(bounds, default=1)
        return
    for group in re.findall(r"(?:calls|branch_computations)=\{?([^})\s]+(?:, %?[\w.-]+)*)", line):
        for name in group.split(","):
            if name.strip().lstrip("%") in computations:
                yield name.strip().lstrip("%"), 1


def _result_bytes(line: str) -> int:
    operation = OPERATION.search(line)
    assert operation is not None
    arrays = [_bytes(*array) for array in ARRAY.findall(line[: operation.start() + 1])]
    # the result of an asynchronous start contains the operand as well
    return max(arrays) if operation[1].endswith("-start") else sum(arrays)


def _bytes(dtype: str, dimensions: str) -> int:
    bits = BITS.get(dtype) or (8 if dtype.startswith("f8") else int(dtype[1:]))
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
