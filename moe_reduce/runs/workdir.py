"""The workdir of a run: claimed by a configuration, finished by its summary."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_reduce.core import config_dict, disk
from moe_reduce.core.config import ModelConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import counts_by_component, parameter_count
from moe_reduce.storage.model_directory import save

SUMMARY = "summary.json"


def finish(
    workdir: Path, model: Model, step: Step, summary: dict[str, Any], report: Callable[[], None] = lambda: None
) -> None:
    """model/ first, then what there is to report about it, summary.json last: its presence means that the run is done.

    By the first process alone."""
    if jax.process_index() == 0:
        save(model, workdir / "model", step, overwrite=True)
        report()
        disk.write_json(workdir / SUMMARY, summary)
    if jax.process_count() > 1:  # none leaves, and takes the others' connection down, before the result is written
        multihost_utils.sync_global_devices("result written")


def writing(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """A full disk below a workdir is one line, and nothing is lost."""
    return disk.writing(f"below {workdir}", "free some space, then run the same command again to go on")


def begin(workdir: Path, run: Any) -> dict[str, Any] | None:
    """Claims the workdir; says so, and returns the summary, when its run is done already."""
    claim(workdir, run)
    done = finished(workdir)
    if done is not None:
        print(f"{workdir} is done: nothing to do (a new --workdir starts again)")
    return done


def finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that is done, {} where only the first process's disk has it; None while it is not."""
    file = workdir / SUMMARY
    done = file.exists()
    if jax.process_count() > 1:  # disks differ, or show each other's files late, and all must do the same
        done = bool(multihost_utils.broadcast_one_to_all(np.asarray(done)))
    if not done:
        return None
    return json.loads(file.read_text()) if file.exists() else {}


def claim(workdir: Path, run: Any) -> None:
    """Makes the workdir this run's, by its resolved configuration; raises UserError when it is another's, or read-only.

    run: a dataclass of moe_reduce.config. Keys that are newer than the workdir have their defaults there. It may go on
    over another mesh, onto which checkpoints are restored. A run that ended before its first step, as for a missing
    corpus, may be corrected and started in the same place.
    """
    file, wanted = workdir / "config.json", to_dict(run)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = config_dict.completed(type(run), json.loads(file.read_text())) if file.exists() else wanted
        moved = found | {"mesh": wanted["mesh"]} if isinstance(found, dict) else found
        difference = _first_difference(moved, wanted)
        began = any(child.is_dir() for child in workdir.iterdir()) or set(found) != set(wanted)
        if difference and began:
            raise UserError(
                f"--workdir={workdir} belongs to another configuration ({difference}): choose another workdir"
            )
        if found != wanted or not file.exists():
            disk.write_json(file, wanted)
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir} cannot be used ({error}): choose another one") from error


def _first_difference(found: Any, wanted: Any, path: str = "") -> str:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return "" if found == wanted else f"{path} is {found!r} there and {wanted!r} here"
    for key in sorted(set(found) | set(wanted)):
        if key not in found or key not in wanted:
            return f"only one of them has {path}{'.' if path else ''}{key}"
        difference = _first_difference(found[key], wanted[key], f"{path}.{key}" if path else key)
        if difference:
            return difference
    return ""


def machine() -> dict[str, Any]:
    """Where a summary's figures were measured."""
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return {"machine": device, "jax": jax.__version__}


def describe(model: ModelConfig) -> dict[str, Any]:
    """Exact parameter counts and fp32 bytes, from abstract initialisation."""
    total = parameter_count(model)
    return {"parameters": total, "by_component": counts_by_component(model), "bytes": 4 * total}
