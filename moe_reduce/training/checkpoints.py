"""Asynchronous Orbax checkpoints of everything that a run needs to resume: training state and data position."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moe_reduce.core import disk, memory
from moe_reduce.core.config import TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.training.steps import State

ASIDE = "damaged-checkpoints"  # directory beside the checkpoints for those that cannot be read


class Checkpoints:
    """The checkpoints of one run; a kill during a save leaves the earlier checkpoints intact."""

    def __init__(self, directory: Path, train: TrainConfig):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=train.checkpoints_kept, enable_async_checkpointing=True, create=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def resume(self, abstract: State, set_position: Callable[[int, dict[str, Any]], None]) -> tuple[State, int] | None:
        """Restore the newest checkpoint that can be read, as (state, step); None where there is none.

        `abstract` gives the shapes and the present mesh's shardings; set_position is called with the step and the data
        position, and raises anything but a UserError for a damaged one. Newer checkpoints that are damaged are moved to
        damaged-checkpoints/, with a warning. UserError when none can be read, and for any damage in a run of several
        processes, which must all restore the same step.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, position = self.restore(step, abstract)
                set_position(step, position)
            except UserError:
                raise
            except Exception as error:  # TensorStore raises exceptions of every type, and of none in particular
                if memory.is_exhausted(error):
                    raise
                damaged[step] = f"checkpoint {self._directory / str(step)} is damaged ({_reason(error)})"
                if jax.process_count() > 1:
                    raise UserError(f"{damaged[step]}: delete it to go on from the one before") from error
                continue
            for number, reason in damaged.items():
                self._set_aside(number)
                print(f"warning: {reason}: moved to {ASIDE}/, going on from step {step}", flush=True)
            return state, step
        if damaged:
            reason = next(iter(damaged.values()))
            raise UserError(f"{reason}, and no earlier one can be read: restore it, or choose another workdir")
        return None

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """Restore state and data position of `step`; raises any exception for a damaged checkpoint."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        return State(*restored["state"]), dict(restored["data"])

    def _set_aside(self, step: int) -> None:
        place = self._directory.with_name(ASIDE)
        with disk.writing(place, "free some space or fix its permissions"):
            place.mkdir(exist_ok=True)
            target = place / str(step)
            if target.exists():  # from an earlier damage at the same step
                shutil.rmtree(target)
            (self._directory / str(step)).rename(target)
        self._manager.reload()

    def latest(self) -> int | None:
        """Number of steps done at the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, data_position: dict[str, Any]) -> None:
        """Start a save and return once the state is copied; the step function may then reuse its buffers."""
        # on CPU a host view shares the device buffer, which is donated to the next step and overwritten
        copy = jax.tree.map(jnp.copy, state) if jax.default_backend() == "cpu" else state
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(copy), data=ocp.args.JsonSave(data_position))
        try:
            self._manager.save(step, args=arguments)
        except Exception as error:  # as in resume
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Block until every started save is on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in resume
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Wait for saves and end the background threads."""
        try:
            self._manager.close()
        except Exception as error:  # as in resume
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot write a checkpoint below {self._directory} ({_reason(error)}): free some space or "
            "choose another --workdir, then run the same command again to resume"
        )


def quiet_failures() -> None:
    """Silence the threads of Orbax and TensorStore, so that a failed save prints only its UserError.

    They log hundreds of lines about one failure, some of them long afterwards. For commands only.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = without_closed_loops


def _reason(error: Exception) -> str:
    """Shorten an error of TensorStore to its reason: the end of its first line, without the store's settings."""
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return first.split(" [")[0].rsplit('": ', 1)[-1][-150:]
