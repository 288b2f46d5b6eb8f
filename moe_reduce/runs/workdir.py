"""The workdir of a run: a configuration claims it, and summary.json marks it as done."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_reduce.core import config_dict, disk, json_files, locks, trees
from moe_reduce.core.config import DataConfig, ModelConfig, to_dict
from moe_reduce.core.errors import UserError
from moe_reduce.core.provenance import Step
from moe_reduce.data.batches import fingerprint
from moe_reduce.data.pieces import TRAIN
from moe_reduce.data.shards import TokenSource
from moe_reduce.models.model import Model
from moe_reduce.models.parameters import counts_by_component, parameter_count
from moe_reduce.models.weights import Quantised
from moe_reduce.storage.model_directory import save

SUMMARY = "summary.json"
# Keys that may change when a run resumes, because neither the model nor its measured quality depends on them:
# checkpoints are restored onto any mesh, and the same steps are trained however often they are logged and saved.
MAY_CHANGE = (
    "mesh", "train.log_every", "train.evaluate_every", "train.checkpoint_every", "train.checkpoints_kept",
    "data.workers", "data.cache", "tasks.cache",
)  # fmt: skip
LOCK = ".lock"
# written by runs: a directory that holds one of them but no config.json belongs to something else
RESULTS = (SUMMARY, "metrics.jsonl", "checkpoints", "adapter", "model")

Run = TypeVar("Run")
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def alone(
    job: Callable[Concatenate[Run, Path, Rest], Result],
) -> Callable[Concatenate[Run, Path, Rest], Result]:
    """Decorate a job so that it holds the lock of its workdir, the second argument, until it ends.

    Raises UserError, and touches nothing, while another run works there. Of the processes of one run only the first
    takes the lock; the others end with it. On a file system without locks it says so and goes on.
    """

    @functools.wraps(job)
    def locked(run: Run, workdir: Path, *rest: Rest.args, **named: Rest.kwargs) -> Result:
        with _lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
            return job(run, workdir, *rest, **named)

    return locked


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_if_empty, workdir)  # a run that was refused leaves nothing
            stack.enter_context(locks.held(workdir / LOCK))
        except locks.LockHeld as holder:
            raise UserError(
                f"--workdir={workdir} is in use by {holder}: wait until that run ends, or choose another workdir"
            ) from None
        except locks.LocksMissing as error:
            print(f"{workdir} has no locks ({error}): start no second run in it", flush=True)
        except OSError:  # a finished run in a workdir that cannot be written does nothing, and claim refuses others
            pass
        yield


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def finish(
    workdir: Path, model: Model, step: Step, summary: dict[str, Any], report: Callable[[], None] = lambda: None
) -> None:
    """Write the result of a run: model/, then its report, and summary.json last, whose presence means "done".

    Only the first process writes. step: appended to the chain of the model. report: writes what belongs beside model/.
    """
    if jax.process_index() == 0:
        save(model, workdir / "model", step, overwrite=True)
        report()
        disk.write_json(workdir / SUMMARY, summary)
    if jax.process_count() > 1:  # a process that exits early would break the connection of the others
        multihost_utils.sync_global_devices("result written")


def writing(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Turn a full disk below a workdir into a UserError; what is written stays usable."""
    return disk.writing(f"below {workdir}", "free some space, then run the same command again to go on")


def begin(workdir: Path, run: Any) -> dict[str, Any] | None:
    """Claim the workdir for a run; if the run is done already, say so and return its summary."""
    claim(workdir, run)
    done = finished(workdir)
    if done is not None:
        print(f"{workdir} is done: nothing to do (a new --workdir starts again)")
    return done


def finished(workdir: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run, {} if this process cannot see its file; None if the run is not finished."""
    file = workdir / SUMMARY
    done = file.exists()
    if jax.process_count() > 1:  # disks differ or show files late, but all processes must decide alike
        done = bool(multihost_utils.broadcast_one_to_all(np.asarray(done)))
    if not done:
        return None
    return disk.read_json(file) if file.exists() else {}


def claim(workdir: Path, run: Any) -> None:
    """Claim the workdir for a run by its resolved configuration.

    run: a configuration dataclass. Keys in MAY_CHANGE may differ from those in config.json, which is rewritten; a key
    that an older config.json lacks counts as its default. A run that ended before its first step, for example because
    its corpus was missing, may be corrected and started in the same workdir. Raises UserError when the workdir belongs
    to another configuration, or cannot be written.
    """
    file, wanted = workdir / "config.json", to_dict(run)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        foreign = [] if file.exists() else [name for name in RESULTS if os.path.lexists(workdir / name)]
        if foreign:
            raise UserError(f"--workdir={workdir} holds {foreign[0]}, which no run wrote there: choose another workdir")
        found = read_run_config(file, type(run)) if file.exists() else wanted
        difference = _first_difference(found, wanted)
        began = any(child.is_dir() for child in workdir.iterdir()) or set(found) != set(wanted)
        if difference and began:
            raise UserError(
                f"--workdir={workdir} belongs to another configuration ({difference}): set it back, or choose "
                "another workdir"
            )
        if found != wanted or not file.exists():
            disk.write_json(file, wanted)
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir} cannot be used ({error}): choose another one") from error


def read_run_config(file: Path, kind: type) -> dict[str, Any]:
    """Read the config.json of a workdir, completed by keys that an older version did not write.

    kind: the dataclass that describes such a run. Raises ValueError when the file holds no configuration.
    """
    try:
        return config_dict.completed(kind, json_files.read_object(file))
    except (UserError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} holds no configuration: {error!r}") from error


def _first_difference(found: Any, wanted: Any, path: str = "") -> str:
    """Describe the first key that differs and is not in MAY_CHANGE; empty when there is none."""
    if path in MAY_CHANGE:
        return ""
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
    """Describe the machine on which the figures of a summary were measured."""
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return {"machine": device, "jax": jax.__version__}


def describe_data(data: DataConfig, tokens: TokenSource) -> dict[str, Any]:
    """Name the text of a run as its configuration does, with the fingerprint and number of its training tokens."""
    return {
        "source": data.source,
        "validation_source": data.validation_source,
        "fingerprint": fingerprint(tokens, data),
        "training_tokens": tokens.rows(TRAIN, data.sequence_length) * data.sequence_length,
    }


def describe(model: ModelConfig, params: Any = None) -> dict[str, Any]:
    """Count parameters and their bytes in fp32, exactly and without allocating any.

    params: of a model whose matrices may be quantised, which then count with the bytes that they take.
    """
    total = parameter_count(model)
    quantised = [value for value in trees.flatten(params or {}).values() if isinstance(value, Quantised)]
    saved = sum(4 * math.prod(one.shape) - sum(x.nbytes for x in jax.tree.leaves(one)) for one in quantised)
    return {"parameters": total, "by_component": counts_by_component(model), "bytes": 4 * total - saved}
