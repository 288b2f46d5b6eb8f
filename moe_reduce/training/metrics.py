"""Logs of a run: metrics.jsonl, TensorBoard, and a stopwatch for its speed."""

import json
import time
from pathlib import Path
from typing import Any, Protocol

import tensorboardX

from moe_reduce.core import json_files
from moe_reduce.core.disk import write_text
from moe_reduce.core.errors import UserError

Metrics = dict[str, float | None]
TIMING = ("tokens_per_second", "mfu")  # fields that differ between two identical runs


class Sink(Protocol):
    """Destination of a run's metrics.

    It is opened with the workdir and the step after which the run goes on, and drops all that an earlier process of the
    run has written about later steps.
    """

    def write(self, step: int, split: str, values: Metrics) -> None:
        """Record the metrics of a step, by name. split: "train" or "validation"."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class JsonLines:
    """metrics.jsonl: one JSON object per line, in step order."""

    def __init__(self, workdir: Path, resumed_step: int):
        path = workdir / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= resumed_step]
        write_text(path, "".join(kept))
        self._stream = path.open("a")

    def write(self, step: int, split: str, values: Metrics) -> None:
        self._stream.write(json.dumps({"step": step, "split": split} | values) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class TensorBoard:
    """Event files of TensorBoard; a metric without a value is left out."""

    def __init__(self, workdir: Path, resumed_step: int):
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, split: str, values: Metrics) -> None:
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._board.close()


SINKS = (JsonLines, TensorBoard)
KINDS = {"step": (int,), "split": (str,), "loss": (int, float)}  # of the values that are read again


class MetricsLog:
    """All sinks of a run, or none in any process but the first."""

    def __init__(self, workdir: Path, resumed_step: int, active: bool = True):
        self._sinks: list[Sink] = [sink(workdir, resumed_step) for sink in SINKS] if active else []

    def write(self, step: int, split: str, values: Metrics) -> None:
        """Record the metrics of a step in every sink."""
        for sink in self._sinks:
            sink.write(step, split, values)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, without a last line that a kill cut short; UserError for other damage."""
    lines = json_files.read_lines(path)
    for number, line in enumerate(lines, start=1):
        for key, kind in KINDS.items():
            if (key in line or key == "step") and type(line.get(key)) not in kind:
                raise UserError(f"{path}:{number} has no {key}: restore the file, or remove that line")
    return lines


class Stopwatch:
    """Counter of seconds spent training, without evaluations and saves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start counting, or continue."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Pause until started again."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def elapsed(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self.seconds + running
