"""Equivalence of a merged model and the adapted one: the merge log and the equivalence report."""

import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_reduce.adapters import merging
from moe_reduce.adapters.adapter import Adapter, activate
from moe_reduce.adapters.targets import targets_of
from moe_reduce.core import trees
from moe_reduce.core.disk import write_json
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Input
from moe_reduce.inference.evaluate import measure
from moe_reduce.models.model import Model
from moe_reduce.models.weights import dequantised, is_quantised
from moe_reduce.storage import manifest

MERGE_LOG = "merge.json"
EQUIVALENCE = "equivalence.json"
# largest allowed difference of a logit, relative to the largest logit, by the dtype of the merged matrices
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
SAMPLE_ROWS = 4  # sequences whose logits are compared
REPEATS = 5  # timed runs; the latency is their median


def equivalence(base: Model, adapter: Adapter, merged: Model, batches: Sequence[Any]) -> dict[str, Any]:
    """Compare the merged model with the active adapter on a fixed sample: logits, perplexity, memory and latency.

    merged: in its saved dtype, which decides the tolerance. All models compute in fp32, so that every
    difference comes from the parameters.
    """
    base, merged = (_in_float32(model) for model in (base, merged))
    active = activate(base, adapter)
    models = {"base": base, "active": active, "merged": merged}
    tokens_BT = np.asarray(batches[0]["tokens"])[:SAMPLE_ROWS]
    with jax.default_matmul_precision("highest"):
        expected, found = (np.asarray(model(tokens_BT), np.float64) for model in (active, merged))
    largest = float(np.max(np.abs(expected)))
    dtype = str(trees.flatten(merged.params)[targets_of(adapter.config, base.config)[0].path].dtype)
    report = {
        "sample": {"batches": len(batches), "tokens": int(sum(np.sum(batch["weights"]) for batch in batches))},
        "largest_logit": largest,
        "largest_logit_difference": float(np.max(np.abs(found - expected))),
        "same_choice": float(np.mean(np.argmax(found, -1) == np.argmax(expected, -1))),
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype],
        "tolerance_is": "of a logit's difference, relative to the largest logit",
        "perplexity": {name: measure(model, batches)["perplexity"] for name, model in models.items()},
        "parameter_bytes": {name: _bytes(model) for name, model in models.items()},
        "peak_memory_bytes": {name: _peak_memory(model, tokens_BT) for name, model in models.items()},
        "latency_seconds": {name: _latency(model, tokens_BT) for name, model in models.items()},
    }
    return report | {"equivalent": report["largest_logit_difference"] <= report["tolerance"] * largest}


def requantising(merged: Model, stored: Model, batches: Sequence[Any]) -> dict[str, Any]:
    """Cost of rounding merged matrices to the base's schemes again: perplexity before and after, and their errors.

    relative_errors: norm of the error of each matrix, relative to the norm of the matrix, by path.
    """
    before, after = trees.flatten(merged.params), trees.flatten(stored.params)
    errors = {}
    for path, value in after.items():
        if is_quantised(value) and not is_quantised(before[path]):
            wide = np.asarray(before[path], np.float64)
            error = np.asarray(dequantised(value, np.float32), np.float64) - wide
            errors[path] = float(np.linalg.norm(error) / max(np.linalg.norm(wide), 1e-30))
    models = {"before": merged, "after": stored}
    return {
        "perplexity": {name: measure(_in_float32(model), batches)["perplexity"] for name, model in models.items()},
        "parameter_bytes": {name: _bytes(model) for name, model in models.items()},
        "relative_errors": errors,
    }


def shown(requantised: dict[str, Any]) -> str:
    """Cost of requantising, in one line."""
    before, after = (requantised["perplexity"][name] for name in ("before", "after"))
    largest = max(requantised["relative_errors"].values())
    return f"perplexity {before:.4f} merged, {after:.4f} requantised; matrices changed by at most {largest:.2%}"


def _in_float32(model: Model) -> Model:
    return dataclasses.replace(model, execution=dataclasses.replace(model.execution, compute_dtype="float32"))


def check(report: dict[str, Any]) -> None:
    """Raise UserError if the report says that the merged model is not equivalent to the adapted one."""
    if not report["equivalent"]:
        raise UserError(
            f"the merged model is not the adapted one: a logit differs by {report['largest_logit_difference']:.2e}, "
            f"and {report['dtype']} allows {report['tolerance']} × the largest logit, {report['largest_logit']:.2e}: "
            "keep the base in float32"
        )


def _bytes(model: Model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


def _peak_memory(model: Model, tokens_BT: Any) -> int:
    """Bytes that the compiled forward pass needs at once: parameters, temporaries and logits."""

    def forward(params: Any, tokens_BT: Any) -> jax.Array:
        return model.with_params(params).apply({"tokens": tokens_BT}).logits_BTV

    needs: Any = jax.jit(forward).lower(model.params, tokens_BT).compile().memory_analysis()
    return int(needs.argument_size_in_bytes + needs.temp_size_in_bytes + needs.output_size_in_bytes)


def _latency(model: Callable[[Any], jax.Array], tokens_BT: Any) -> float:
    jax.block_until_ready(model(tokens_BT))
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(model(tokens_BT))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _digest(report: dict[str, Any]) -> str:
    """SHA-256 of a report as compact JSON with sorted keys, without its latencies, which no second merge repeats."""
    repeatable = {name: value for name, value in report.items() if name != "latency_seconds"}
    return hashlib.sha256(json.dumps(repeatable, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_reports(
    directory: Path, files: Mapping[str, str], base: Input, adapter: Adapter, report: dict[str, Any]
) -> None:
    """Write merge.json and equivalence.json. files: SHA-256 of the merged model's files, by name.

    merge.json holds the hash of everything in the report but the latencies.
    """
    write_json(directory / EQUIVALENCE, report)
    write_json(
        directory / MERGE_LOG,
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "order": merging.ORDER,
            "dtype": "float32",
            "base": {"path": base.path, "sha256": base.sha256},
            "adapter": merging.digest(adapter),
            "merged": {name: digest for name, digest in files.items() if name.endswith(".safetensors")},
            "equivalence": _digest(report),
            "versions": manifest.versions(),
            "commit": manifest.commit(),
        },
    )
