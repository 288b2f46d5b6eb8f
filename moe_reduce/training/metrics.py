"""Logs of a run: metrics.jsonl, TensorBoard, and a stopwatch for its speed."""

import json
import os
import time
from pathlib import Path
from typing import Any

import tensorboardX

TIMING = ("tokens_per_second", "mfu")  # fields that differ between two identical runs


class MetricsLog:
    """Writer of metrics.jsonl, one JSON object a line, in step order.

    A resumed run first drops the lines after its checkpoint, which it will write again.
    """

    def __init__(self, workdir: Path, resumed_step: int, active: bool = True):
        self._path, self._active = workdir / "metrics.jsonl", active
        if not active:
            return
        kept = [json.dumps(line) + "\n" for line in read_metrics(self._path) if line["step"] <= resumed_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._path)
        self._stream = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append a line; only the first process of a run writes."""
        if not self._active:
            return
        self._stream.write(json.dumps({"step": step, "split": split} | values) + "\n")
        self._stream.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self._active:
            self._stream.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a metrics file; skip a line that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
