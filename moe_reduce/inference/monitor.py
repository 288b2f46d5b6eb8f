"""Sampling of CPU, memory, GPU and GPU memory in a thread, while a block of code runs."""

import shutil
import subprocess
import threading
import time
from types import TracebackType
from typing import Any, NamedTuple

import psutil

PAUSE = 0.5  # seconds
NVIDIA = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")


class Sample(NamedTuple):
    """One sample. GPU figures cover all GPUs: mean utilisation, total memory; None without nvidia-smi."""

    seconds: float  # since the first sample
    cpu_percent: float  # over all cores
    ram_percent: float
    gpu_percent: float | None
    vram_mb: float | None


class Measured(NamedTuple):
    """Findings about a model: values by column of the table, and the load of the machine while it answered."""

    row: dict[str, Any]  # None or missing where unknown
    samples: list[Sample]


class Monitor:
    """Context manager that fills `samples`: one at the start, one at the end, and one every `pause` seconds between."""

    def __init__(self, pause: float = PAUSE):
        self.samples: list[Sample] = []
        self._pause, self._stop = pause, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._nvidia = shutil.which(NVIDIA[0]) is not None

    def __enter__(self) -> "Monitor":
        self._started = time.perf_counter()
        psutil.cpu_percent()  # utilisation is measured since the previous call
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def peak(self, name: str) -> float | None:
        """Largest value of a field of Sample; None if it was never known."""
        found = [value for sample in self.samples if (value := getattr(sample, name)) is not None]
        return max(found, default=None)

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            self._sample()

    def _sample(self) -> None:
        seconds = time.perf_counter() - self._started
        gpu = _gpu() if self._nvidia else (None, None)
        self.samples.append(Sample(seconds, psutil.cpu_percent(), psutil.virtual_memory().percent, *gpu))


def _gpu() -> tuple[float | None, float | None]:
    try:
        text = subprocess.run(NVIDIA, capture_output=True, text=True, check=True, timeout=5).stdout
        cards = [[float(value) for value in line.split(",")] for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):  # the driver does not answer, or answers [N/A]
        return None, None
    if not cards:
        return None, None
    return sum(percent for percent, _ in cards) / len(cards), sum(memory for _, memory in cards)
