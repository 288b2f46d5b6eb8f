"""Shared code of the benchmarks: timing programs against each other, and writing a result.

Each side has its own process, so that none inherits another's heap, and sides run in turn, so that drift of the
machine's speed affects all alike.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

RESULTS = Path(__file__).parent.parent / "docs/results"

Run = Callable[[], Any]  # a training step returns its loss
Build = Callable[..., tuple[Run, Any]]  # -> (the run to time, facts to report about it)


def medians(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median seconds of each run, timed in turn; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def _serve(connection: Any, build: Build, *arguments: Any) -> None:
    run, said = build(*arguments)
    first = run()
    connection.send((said, first if isinstance(first, float) else None))
    while connection.recv():
        made = run()
        connection.send(made if isinstance(made, float) else None)


class Side:
    """One side of a comparison in its own process; `said` holds the facts that its `build` returned."""

    def __init__(self, build: Build, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, *arguments))
        self.process.start()
        theirs.close()
        self.said, first = self.connection.recv()
        self.losses = [first]

    def __call__(self) -> None:
        """Runs once and waits for the end."""
        self.connection.send(True)
        self.losses.append(self.connection.recv())

    def end(self) -> None:
        """Ends the process and frees its memory."""
        self.connection.send(False)
        self.process.join()


def compare(
    builds: dict[str, tuple[Any, ...]], repeats: int, vocab_size: int | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """(median seconds, facts) by name, of builds with their arguments.

    vocab_size: if given, checks that all builds learn, starting from random weights.
    """
    sides = {name: Side(*build) for name, build in builds.items()}
    seconds = medians(dict(sides), repeats)
    for name, side in sides.items():
        side.end()
        if vocab_size is not None:
            check_learning(name, side.losses, vocab_size)
    return seconds, {name: side.said for name, side in sides.items()}


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Result of the function, called in a new process, so that no memory is shared with other calls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def check_learning(name: str, losses: list[Any], vocab_size: int) -> None:
    """Raises unless losses begin near ln V, as with random weights, and end lower: a no-op step would be fast."""
    if not (abs(losses[0] / np.log(vocab_size) - 1) < 0.1 and losses[-1] < losses[0]):
        raise AssertionError(f"{name} does not train: losses {losses}, expected to begin near {np.log(vocab_size):.2f}")


def options(description: str, name: str, repeats: int) -> argparse.Namespace:
    """Parses a benchmark's options: tiny, repeats and out; name: of its result."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a quick check of the script; needs --out")
    parser.add_argument("--repeats", type=int, default=repeats, help="that a median is taken of (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help=f"directory (default: docs/results/{name})")
    given = parser.parse_args()
    if given.tiny and given.out is None:
        parser.error("--tiny needs --out: its figures are no result")
    given.out = given.out or RESULTS / name
    given.repeats = 1 if given.tiny else given.repeats
    return given


def publish(out: Path, result: dict[str, Any]) -> None:
    """Prints the rows of a result, and writes it where `moe-reduce report` finds it."""
    for row in result["rows"]:
        print("  ".join(row))
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print(out / "summary.json")
