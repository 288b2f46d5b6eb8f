"""Asynchronous Orbax checkpoints of everything that a run needs to resume: training state and data position."""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from moe_reduce.core.config import TrainConfig
from moe_reduce.core.errors import UserError
from moe_reduce.training.steps import State


class Checkpoints:
    """The checkpoints of one run; a kill during a save leaves the earlier checkpoints intact."""

    def __init__(self, directory: Path, train: TrainConfig):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=train.checkpoints_kept, enable_async_checkpointing=True, create=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

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
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """Restore state and data position of `step`; `abstract` gives the shapes and the present mesh's shardings."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=arguments)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be read ({_reason(error)}): delete it to "
                "go on from the one before"
            ) from error
        return State(*restored["state"]), restored["data"]

    def wait(self) -> None:
        """Block until every started save is on disk."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Wait for saves and end the background threads."""
        self._manager.close()

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
