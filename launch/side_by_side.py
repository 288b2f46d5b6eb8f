"""Two programs timed beside each other: each in a process of its own, in turn, medians of seconds.

Neither runs in what the other's allocator left, and a machine whose speed drifts slows all alike.
"""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], Any]
Build = Callable[..., tuple[Run, Any]]  # what is timed, and what it has to say of itself


def medians(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def _serve(connection: Any, build: Build, *arguments: Any) -> None:
    run, said = build(*arguments)
    run()
    connection.send(said)
    while connection.recv():
        run()
        connection.send(None)


class Side:
    """One side of a comparison in a process of its own; `said` is what its `build` says."""

    def __init__(self, build: Build, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, *arguments))
        self.process.start()
        theirs.close()
        self.said = self.connection.recv()

    def __call__(self) -> None:
        """Once, waited for."""
        self.connection.send(True)
        self.connection.recv()

    def end(self) -> None:
        """Gives its memory back."""
        self.connection.send(False)
        self.process.join()


def compare(builds: dict[str, tuple[Any, ...]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(median seconds, what each says) of builds with their arguments, by name."""
    sides = {name: Side(*build) for name, build in builds.items()}
    seconds = medians(dict(sides), repeats)
    for side in sides.values():
        side.end()
    return seconds, {name: side.said for name, side in sides.items()}
