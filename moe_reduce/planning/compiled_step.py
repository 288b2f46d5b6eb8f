"""A run's training step compiled for devices that need not be there, and what the compiler says it takes."""

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
UNKNOWN = 2**63 - 1  # what the compiler writes in place of an estimate
MOST = 10  # sources of estimated cycles that a report names
BITS = {"pred": 8, "bf16": 16}


def compile_step(job: Job, mesh: Mesh, memory: int) -> dict[str, Any]:
    """What one training step takes on each device of the mesh, of `memory` bytes: by kind, and whether it fits."""
    step = footprint.of(job, mesh)
    started = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = step.program.step.lower(step.program.state, step.frozen, step.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"total memory required.*?\(([\d.]+\w)\).*?\(([\d.]+\w)\)", str(error))
        said = {"needed": needed[1], "available": needed[2]} if needed else {"compiler": str(error).splitlines()[0]}
        return {"fits": False, "held_bytes": step.held(), **said, "remedy": step.remedy(memory)}
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
    """The optimised program; empty where the compiler cannot write it down, as libtpu 0.0.52's for v5p and v6e."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        print(f"collectives and cycles stay unknown, the compiler does not show the program: {error}", file=sys.stderr)
        return "ENTRY main () {"


def model_flops(job: Job, devices: int) -> float | None:
    """Of a step on each device: forward and backward, without what is computed again; None as `Job` says."""
    if job.flops_per_token is None:
        return None
    return job.train.batch_size * job.data.sequence_length * job.flops_per_token / devices


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{type: {"count", "bytes"}} of what one device runs in a step; bytes are those of the results. Loops multiply."""
    count: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for line, name, times in _executed(_computations(hlo)):
        if name in COLLECTIVES:
            count[name] += times
            moved[name] += times * _result_bytes(line)
    return {name: {"count": count[name], "bytes": moved[name]} for name in COLLECTIVES if count[name]}


def estimated_cycles(hlo: str) -> dict[str, int]:
    """{where in the model: cycles} of a step on one device, the most first, as TPU's compiler estimates them; {} where
    it does not. Loops multiply. Passes over memory only: kernels, products, gathers and scatters have no estimate.
    """
    found: Counter[str] = Counter()
    # what is fused has estimates of its own on some chips, which are part of the fusion's
    for line, name, times in _executed(_computations(hlo), fused=False):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles and int(cycles[1]) != UNKNOWN:
            source = re.search(r'op_name="([^"]*)"', line)
            found[source[1] if source else name] += times * int(cycles[1])
    return dict(found.most_common())


def _computations(hlo: str) -> dict[str, list[str]]:
    """The instructions of each computation by its name, and of the entry by "ENTRY"."""
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
    """(instruction, its operation, how often it runs) of all that a computation runs, and what is fused in it."""
    for line in computations[computation]:
        operation = OPERATION.search(line)
        name = operation[1].removesuffix("-start") if operation else ""
        # on TPU a fusion of an all-reduce and the slice that a device keeps, which only that slice leaves
        if re.search(r"calls=%?all-reduce-scatter", line):
            yield line, "reduce-scatter", times
            continue
        yield line, name, times
        if name == "fusion" and not fused:
            continue
        for called, repeats in _called(computations, line, name):
            yield from _executed(computations, called, times * repeats, fused)


def _called(computations: dict[str, list[str]], line: str, operation: str) -> Iterator[tuple[str, int]]:
    """(computation, how often) that an instruction runs; what a reduction applies to two numbers is none of them."""
    if operation == "while":
        condition = re.search(r"condition=%?([\w.-]+)", line)
        body = re.search(r"body=%?([\w.-]+)", line)
        assert condition is not None
        assert body is not None
        known = re.search(r"known_trip_count\W+n\W+(\d+)", line)
        # the bound that the counter is compared with; 1 where it is computed
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
    # what has started holds its operand beside its result
    return max(arrays) if operation[1].endswith("-start") else sum(arrays)


def _bytes(dtype: str, dimensions: str) -> int:
    bits = BITS.get(dtype) or (8 if dtype.startswith("f8") else int(dtype[1:]))
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
