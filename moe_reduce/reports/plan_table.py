"""The tables of `plan`: one row for each model or stage."""

from collections.abc import Mapping
from typing import Any

from moe_reduce.core.devices import GB, GIB
from moe_reduce.reports import tables

Plans = Mapping[str, dict[str, Any]]


def serving_table(plans: Plans) -> str:
    """Aligned text: the size of each model, the memory that inference needs, and whether it fits the device."""
    first = next(iter(plans.values()))
    columns = ["", "experts", "parameters", "active", "weights", "with cache"]
    columns += ["fits", "tokens/s at most"] if "device" in first else []
    rows = [columns, *([name, *_serving_cells(plan)] for name, plan in plans.items())]
    batch = f"{first['batch']} sequence{'s' if first['batch'] > 1 else ''} of {first['context']:,} tokens"
    at = f"weights in {first['dtype']}, cache in {first['cache_dtype']}, {batch}"
    notes = [at + (f", on {first['device']}" if "device" in first else "")]
    for name, plan in plans.items():
        if "would_fit_with" in plan:
            notes.append(f"{name} would fit with {_changes(plan['would_fit_with'])}")
    return "\n".join([tables.aligned(rows), *notes])


def _serving_cells(plan: dict[str, Any]) -> list[str]:
    cells = [
        f"{plan['experts']:,}" if plan["experts"] else "-",
        f"{plan['parameters']:,}",
        f"{plan['active_parameters']:,}",
        size(plan["serving_bytes"]["weights"]),
        size(plan["serving_bytes"]["total"]),
    ]
    if "device" in plan:
        cells.append(f"{'yes' if plan['fits'] else 'no'}, {plan['share_of_memory']:.0%}")
        cells.append(f"{plan['decode_bound_tokens_per_second']:,.0f}")
    return cells


def _changes(changes: dict[str, str] | str) -> str:
    return changes if isinstance(changes, str) else ", or ".join(changes)


def step_table(plans: Plans) -> str:
    """Aligned text: the memory that a training step of each run or stage needs on each device."""
    rows = [["", "mesh", "batch", "bytes of a device", "fits"]]
    notes = []
    for name, plan in plans.items():
        fits = "yes" if plan["fits"] else "no"
        share = f", {plan['share_of_memory']:.0%}" if "share_of_memory" in plan else ""
        needed = size(plan["bytes"]) if "bytes" in plan else plan.get("needed", "too many")
        rows.append([name, plan["mesh"], plan["batch"], needed, fits + share])
        if "remedy" in plan:
            notes.append(f"{name}: {plan['remedy']}")
    first = next(iter(plans.values()))
    on = f"on {first['devices']} device(s) of {first['topology']} with {size(first['memory_bytes'])} each"
    return "\n".join([tables.aligned(rows), on, *notes])


def format_table(plans: Plans) -> str:
    """Aligned text: for each model, format × size of the weights, and context × size of the cache (GB and GiB)."""
    return "\n\n".join(_formats(name, plan) for name, plan in plans.items())


def _formats(name: str, plan: dict[str, Any]) -> str:
    weights = [["weights", "bits a weight", "GB", "GiB"]]
    for kind, count in plan["weight_bytes"].items():
        weights.append([kind, f"{plan['bits_per_weight'][kind]:g}", *_gigabytes(count)])
    contexts = plan["cache_bytes"]
    widths = next(iter(contexts.values()))
    cache = [["cache of one sequence", *(f"{bits} bits, {unit}" for bits in widths for unit in ("GB", "GiB"))]]
    for context, by_bits in contexts.items():
        cells = [cell for count in by_bits.values() for cell in _gigabytes(count)]
        cache.append([f"{context:,} tokens", *cells])
    heading = f"{name}: {plan['parameters']:,} parameters"
    return "\n".join([heading, tables.aligned(weights), tables.aligned(cache)])


def _gigabytes(count: int) -> list[str]:
    return [f"{count / GB:,.2f}", f"{count / GIB:,.2f}"]


def size(count: float) -> str:
    """Bytes with a decimal unit, such as 61.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
