"""Common code of the benchmarks: time programs side by side, and write a result.

Each program runs in its own process, so that none inherits another's heap. Programs run in turn, so that changes in the
speed of the machine affect all of them equally.
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
    run, facts = build(*arguments)
    first = run()
    connection.send((facts, first if isinstance(first, float) else None))
    while connection.recv():
        made = run()
        connection.send(made if isinstance(made, float) else None)


class Side:
    """One program of a comparison, in its own process; `facts` holds what its `build` returned."""

    def __init__(self, build: Build, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, *arguments))
        self.process.start()
        theirs.close()
        self.facts, first = self.connection.recv()
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
    """(median seconds, facts) by name. builds: {name: (build, its arguments)}.

    vocab_size: if given, checks that all programs learn, starting from random weights.
    """
    sides = {name: Side(*build) for name, build in builds.items()}
    seconds = medians(dict(sides), repeats)
    for name, side in sides.items():
        side.end()
        if vocab_size is not None:
            check_learning(name, side.losses, vocab_size)
    return seconds, {name: side.facts for name, side in sides.items()}


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Result of the function, called in a new process, so that memory is measured apart from other calls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def check_learning(name: str, losses: list[Any], vocab_size: int) -> None:
    """Raises unless losses begin near ln V, as with random weights, and fall: a step that does nothing is fast."""
    if not (abs(losses[0] / np.log(vocab_size) - 1) < 0.1 and losses[-1] < losses[0]):
        raise AssertionError(f"{name} does not train: losses {losses}, expected to begin near {np.log(vocab_size):.2f}")


def options(description: str, name: str, repeats: int) -> argparse.Namespace:
    """Parses a benchmark's options: tiny, repeats and out.

    description: shown by --help, usually the docstring of the script. name: directory of the result in docs/results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a quick check of the script; needs --out")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="runs of which the median is taken (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help=f"directory of the result (default: docs/results/{name})"
    )
    given = parser.parse_args()
    if given.tiny and given.out is None:
        parser.error("--tiny needs --out, because its numbers must not replace a result: give a directory")
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
